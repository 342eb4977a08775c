"""From rendered conversations to the tensors of one micro batch.

Packed, the conversations of a micro batch share rows no wider than its longest one, each with its own positions from
0, which is how transformers keeps them apart when no attention mask is given (it holds for sdpa and eager
attention without a cache). Unpacked, a row is a conversation, padded on the right. Either way the step holds the
same conversations and the same supervised tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100


@dataclass(frozen=True)
class Collate:
    """Makes a micro batch. B rows, T tokens: input_ids, labels [B, T]; position_ids [B, T] packed, attention_mask
    [B, T] unpacked.
    """

    pad_id: int
    packing: bool

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows of {"input_ids", "labels"}; `n_tokens` counts the tokens that are not padding."""
        lengths = [len(row["input_ids"]) for row in rows]
        width = max(lengths)
        bins = first_fit(lengths, width) if self.packing else [[i] for i in range(len(rows))]
        shape = (len(bins), width)
        input_ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORED)
        positions = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        for b, members in enumerate(bins):
            at = 0
            for i in members:
                end = at + lengths[i]
                input_ids[b, at:end] = torch.as_tensor(rows[i]["input_ids"])
                labels[b, at:end] = torch.as_tensor(rows[i]["labels"])
                labels[b, at] = (
                    IGNORED  # the first token has nothing before it; in a packed row its neighbour is another talk
                )
                positions[b, at:end] = torch.arange(lengths[i])
                mask[b, at:end] = 1
                at = end
            positions[b, at:] = torch.arange(width - at)
        batch = {"input_ids": input_ids, "labels": labels, "n_tokens": torch.tensor(sum(lengths))}
        return {**batch, "position_ids": positions} if self.packing else {**batch, "attention_mask": mask}


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """First-fit decreasing: bins of item indices whose lengths sum to at most `width`. Deterministic; n² at worst on
    small n.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((b for b, free in enumerate(room) if free >= lengths[i]), None)
        if at is None:
            bins.append([i])
            room.append(width - lengths[i])
        else:
            bins[at].append(i)
            room[at] -= lengths[i]
    return bins
