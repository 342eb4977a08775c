"""Rows of several adapters cut into micro batches that one forward pass of a stack takes.

A share is what one adapter learns from in one step, or is measured on. Its rows are packed (several conversations in
a row, each with positions from 0) where the adapter allows it, padded on the right where not; the two never meet in
one batch. Small shares of several adapters are joined; a share that fills a batch by itself is cut the same way
whoever learns beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolkit.fit.rows import IGNORED, laid_out, packed

# B rows of a batch (each holds one or more conversations), T tokens, N supervised tokens.

Row = tuple[Sequence[int], Sequence[int]]  # token ids, labels
AT_ONCE = 64  # conversations that are packed together: packing costs their square


@dataclass(frozen=True)
class Share:
    """Conversations of one adapter. `slot`: its owner number in the stack; `draws`: a number per conversation that
    dropout follows from, None: no dropout.
    """

    slot: int
    rows: Sequence[Row]
    packing: bool
    draws: Sequence[int] | None = None


@dataclass(frozen=True)
class Limits:
    """What one batch may hold: tokens, padding included, and supervised tokens (each costs a row of logits)."""

    n_tokens: int
    n_supervised: int


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass. `share_N`: for each supervised token, in the order of `keep_BT`, the number of its share;
    `extra`: position_ids packed, attention_mask unpacked.
    """

    input_ids_BT: Tensor
    keep_BT: Tensor
    targets_N: Tensor
    share_N: Tensor
    owners: tuple[int, ...]
    extra: dict[str, Tensor]
    draws_B: Tensor | None


@dataclass
class _Piece:
    """Bins of one share that stay together; every bin is a row of the batch."""

    share: int
    bins: list[list[int]]
    width: int
    n_supervised: int


@dataclass
class _Open:
    """A batch that is being filled."""

    pieces: list[_Piece] = field(default_factory=list)

    def would_hold(self, piece: _Piece, limits: Limits) -> bool:
        """Whether one more piece fits."""
        every = [*self.pieces, piece]
        n_bins, width = sum(len(one.bins) for one in every), max(one.width for one in every)
        n_supervised = sum(one.n_supervised for one in every)
        return n_bins * width <= limits.n_tokens and n_supervised <= limits.n_supervised


def micro_batches(shares: Sequence[Share], limits: Limits, pad_id: int, device: torch.device) -> Iterator[MicroBatch]:
    """Every row of every share, in batches within the limits; a single row may exceed them.

    The order follows the shares: rows of one adapter stand side by side. Cost: sorting; tensors are made one batch at a
    time.
    """
    for packing in (True, False):
        opened = _Open()
        for number, share in enumerate(shares):
            if share.packing != packing:
                continue
            for piece in _pieces(number, share, limits):
                if opened.pieces and not opened.would_hold(piece, limits):
                    yield _made(opened.pieces, shares, pad_id, device)
                    opened = _Open()
                opened.pieces.append(piece)
        if opened.pieces:
            yield _made(opened.pieces, shares, pad_id, device)


def n_supervised(rows: Sequence[Row]) -> int:
    """How many tokens a loss over these rows is divided by; the first of a row has nothing before it."""
    return sum(sum(label != IGNORED for label in labels[1:]) for _, labels in rows)


def _pieces(number: int, share: Share, limits: Limits) -> Iterator[_Piece]:
    """Bins of a share, gathered into pieces that a batch holds."""
    piece: _Piece | None = None
    for members, width in _bins(share, limits):
        n_kept = n_supervised([share.rows[i] for i in members])
        if piece is not None:
            is_full = (len(piece.bins) + 1) * max(piece.width, width) > limits.n_tokens
            if is_full or piece.n_supervised + n_kept > limits.n_supervised:
                yield piece
                piece = None
        if piece is None:
            piece = _Piece(number, [], width, 0)
        piece.width = max(piece.width, width)
        piece.bins.append(members)
        piece.n_supervised += n_kept
    if piece is not None:
        yield piece


def _bins(share: Share, limits: Limits) -> Iterator[tuple[list[int], int]]:
    """Conversations that share a row, and the width of it; unpacked one each, the longest first."""
    lengths = [len(ids) for ids, _ in share.rows]
    if not share.packing:
        yield from (([i], lengths[i]) for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)))
        return
    for start in range(0, len(lengths), AT_ONCE):
        some = lengths[start : start + AT_ONCE]
        bins, width = packed(some, limits.n_tokens)
        yield from (([start + i for i in members], width) for members in bins)


def _made(pieces: Sequence[_Piece], shares: Sequence[Share], pad_id: int, device: torch.device) -> MicroBatch:
    every = [(shares[piece.share], piece.share, members) for piece in pieces for members in piece.bins]
    width = max(piece.width for piece in pieces)
    bins = [[share.rows[i] for i in members] for share, _, members in every]
    ids_BT, labels_BT, positions_BT, mask_BT = laid_out(bins, width, pad_id)
    draws = [0 if share.draws is None else share.draws[members[0]] for share, _, members in every]
    share_B = [number for _, number, _ in every]
    keep_BT = torch.nn.functional.pad(labels_BT[:, 1:] != IGNORED, (0, 1), value=False)
    packing = shares[pieces[0].share].packing
    has_dropout = any(share.draws is not None for share in shares)
    return MicroBatch(
        input_ids_BT=ids_BT.to(device),
        keep_BT=keep_BT.to(device),
        targets_N=labels_BT[:, 1:][keep_BT[:, :-1]].to(device),
        share_N=torch.tensor(share_B)[:, None].expand(len(bins), width)[keep_BT].to(device),
        owners=tuple(shares[number].slot for number in share_B),
        extra={"position_ids": positions_BT.to(device)} if packing else {"attention_mask": mask_BT.to(device)},
        draws_B=torch.tensor(draws, dtype=torch.long, device=device) if has_dropout else None,
    )
