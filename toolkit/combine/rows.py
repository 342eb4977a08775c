"""Adapters of a stack opened for decoding, in one batch: for every prompt a row for each, or each with its own prompt.

What `toolkit.generate` decodes over is an Opened; these give it a stack where it expects a model.
"""

# B prompts in a batch, K members, T new tokens, S tokens so far, N kept positions, V vocabulary.

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.adapters import anatomy
from toolkit.adapters.opened import Opened
from toolkit.combine.contract import called
from toolkit.stack.stack import Gates, Stack


class RowCache:
    """A stack's cache and the owners of its rows, in blocks of as many rows as there are prompts.

    It is reordered by prompt: a prompt that leaves takes its row out of every block.
    """

    def __init__(self, stack: Stack, owners: Sequence[int], n_blocks: int) -> None:
        self.owners, self.n_blocks = list(owners), n_blocks
        with torch.no_grad():
            self.kept = stack.start(self.owners)

    def reorder_cache(self, places: Tensor) -> None:
        """See transformers' Cache."""
        n_rows = len(self.owners) // self.n_blocks
        blocks = torch.arange(self.n_blocks, device=places.device) * n_rows
        rows = (blocks[:, None] + places).flatten()
        self.kept.reorder_cache(rows)
        self.owners = [self.owners[row] for row in rows.tolist()]


@dataclass(frozen=True)
class Apart(Opened):
    """Members of a stack, each of which answers a row of its own; `owners`: their slots, -1 for the base.

    A batch has as many rows as there are members, in their order; one member alone answers any number of rows.
    """

    stack: Stack
    owners: tuple[int, ...]

    @property
    def takes_any_row(self) -> bool:
        """See Opened."""
        return len(self.owners) == 1

    @property
    def needs_equal_lengths(self) -> bool:
        """See Opened."""
        return any(self.stack.n_prefix(self.owners)) and anatomy.sliding_window(self.model) is not None

    def start(self, n_rows: int) -> Any:
        """A fresh cache with the prefixes of those members that have one."""
        return RowCache(self.stack, self._rows_of(n_rows), 1)

    def logits(self, ids_BT: Tensor, mask_BS: Tensor, cache: Any, keep_BT: Tensor | None = None) -> Tensor:
        """See Opened."""
        owners = self._rows_of(len(ids_BT)) if cache is None else cache.owners
        given: dict[str, Any] = {"attention_mask": mask_BS, "use_cache": cache is not None}
        if cache is not None:
            given["past_key_values"] = cache.kept
        if keep_BT is None and "logits_to_keep" in self.takes:
            given["logits_to_keep"] = 1
        elif keep_BT is not None and self._keeps_by_mask:
            given["logits_to_keep"] = keep_BT.bool()
        with torch.no_grad():
            logits: Tensor = self.stack(ids_BT, owners, gates=self.gates(), **given).logits
        if keep_BT is None:
            return logits[:, -1]
        return logits if logits.dim() == 2 else logits[keep_BT.bool()]

    def gates(self) -> Gates | None:
        """What each token's experts weigh, where a gate decides."""
        return None

    def _rows_of(self, n_rows: int) -> tuple[int, ...]:
        return self.owners * n_rows if len(self.owners) == 1 else self.owners[:n_rows]


@dataclass(frozen=True)
class Together(Apart):
    """Members of a stack, all of which answer every row. Rows of one member follow each other, so that a forward pass
    reads its weights once."""

    @property
    def n_members(self) -> int:
        """See Opened."""
        return len(self.owners)

    @property
    def takes_any_row(self) -> bool:
        """See Opened."""
        return True

    def start(self, n_rows: int) -> Any:
        """See Apart.start."""
        return RowCache(self.stack, self._owners(n_rows), len(self.owners))

    def each(self, ids_BT: Tensor, mask_BS: Tensor, cache: Any, keep_BT: Tensor | None = None) -> Tensor:
        """What each member says after each row's last token, [K, B, V]; with `keep_BT` after those kept, [K, N, V]."""
        n_members = len(self.owners)
        alone = Apart(
            self.model, self.wearer, self.n_prefix, self.context, self.takes, self.stack, self._owners(len(ids_BT))
        )
        kept_BT = None if keep_BT is None else keep_BT.repeat(n_members, 1)
        found = alone.logits(ids_BT.repeat(n_members, 1), mask_BS.repeat(n_members, 1), cache, kept_BT)
        return found.view(n_members, -1, found.shape[-1])

    def _owners(self, n_rows: int) -> tuple[int, ...]:
        return tuple(owner for owner in self.owners for _ in range(n_rows))


@contextmanager
def answering(stack: Stack, members: Sequence[str | None], kind: type[Apart], **more: Any) -> Iterator[Any]:
    """Members of a stack opened, with dropout off while it lasts. `more`: what the kind takes beside these.

    Raises: AdapterError for a member that the stack lacks; InputError for none, or one that stands twice.
    """
    called(members)
    owners = tuple(stack.owners(members).tolist())
    base, trained = stack.base, stack.base.training
    most = getattr(anatomy.text_config(base), "max_position_embeddings", None)
    base.eval()
    try:
        yield kind(
            model=base,
            wearer=base,
            n_prefix=0,  # the stack puts prefixes into the cache, and positions, by itself
            context=None if most is None else int(most) - max(stack.n_prefix(owners)),
            takes=frozenset(inspect.signature(base.forward).parameters),
            stack=stack,
            owners=owners,
            **more,
        )
    finally:
        base.train(trained)
