"""Log-likelihood of given tokens: of supervised positions in whole rows, and of continuations after prompts.

Only supervised positions go through the head. Rows of like length share batches of at most `batch_tokens` tokens
(padding included), so a larger batch changes memory and speed, and numbers by rounding alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from toolkit.adapters.opened import Opened, measuring
from toolkit.errors import InputError, Problem

# B rows, T tokens, S tokens so far, N supervised positions, V vocabulary.

Pair = tuple[Sequence[int], Sequence[int]]  # (prompt, continuation) or (ids, labels)
IGNORED = -100
_HEAD_NUMBERS = 64_000_000  # logits in one batch: 256 MB in float32; a single row may need more


def score(model: nn.Module | Opened, rows: Sequence[Pair], *, batch_tokens: int = 8192) -> list[list[float]]:
    """For every (prompt, continuation) the log-likelihood of each token of the continuation, in nats.

    Rows with the same prompt share one computation of it (a text and its possible labels, say). What is opened already
    may be several adapters that answer as one; `batch_tokens` counts the rows of them all.
    Raises: InputError for a row whose prompt is empty, or that the base's context does not hold, and for adapters that
    answer a row of their own each.
    """
    with measuring(model) as opened:
        batch_tokens = _batch_tokens(opened, batch_tokens)
        _check([(prompt, [*prompt, *continuation]) for prompt, continuation in rows], opened)
        owners: dict[tuple[int, ...], list[int]] = {}
        for number, (prompt, continuation) in enumerate(rows):
            if continuation:
                owners.setdefault(tuple(prompt), []).append(number)
        found: list[list[float]] = [[] for _ in rows]
        shared = [_Shared(prompt, tuple(mine)) for prompt, mine in owners.items() if len(mine) > 1 and len(prompt) > 1]
        sharing = {number for one in shared for number in one.rows}
        alone = [number for mine in owners.values() for number in mine if number not in sharing]
        whole = [_with_labels(*rows[number]) for number in alone]
        for number, values in zip(alone, _of_rows(opened, whole, batch_tokens), strict=True):
            found[number] = values
        for batch in _shared_batches(shared, rows, batch_tokens, opened.needs_equal_lengths):
            for number, values in _of_shared(opened, batch, rows):
                found[number] = values
    return found


def supervised_log_likelihoods(
    model: nn.Module | Opened, rows: Sequence[Pair], *, batch_tokens: int = 8192
) -> list[list[float]]:
    """For every (ids, labels) the log-likelihood of each label that is not IGNORED, in order, in nats.

    A label stands at the position of its own token, as in training; the first position can have none.
    Raises: InputError for a row with a label at its first position, or that the base's context does not hold, and for
    adapters that answer a row of their own each.
    """
    with measuring(model) as opened:
        batch_tokens = _batch_tokens(opened, batch_tokens)
        _check([([] if labels and labels[0] != IGNORED else [0], ids) for ids, labels in rows], opened)
        return _of_rows(opened, rows, batch_tokens)


@dataclass(frozen=True)
class _Shared:
    """A prompt and the rows that continue it."""

    prompt: tuple[int, ...]
    rows: tuple[int, ...]


def _batch_tokens(opened: Opened, asked: int) -> int:
    """How many tokens of rows share a batch, where one row may be computed several times."""
    if not opened.takes_any_row:
        says = "they answer a row of their own each, and scoring takes rows in any order. Score each of them alone."
        raise InputError("adapters to score with", [Problem("", says)])
    return max(1, asked // opened.n_members)


def _check(rows: Sequence[Pair], opened: Opened) -> None:
    """Of every row what stands before its first scored token, and the whole."""
    problems = []
    for number, (before, ids) in enumerate(rows):
        if not before:
            problems.append(Problem(f"row {number}", "nothing stands before its first token. Put a token in front."))
        if opened.context is not None and len(ids) > opened.context:
            says = f"has {len(ids)} tokens; the base holds {opened.context}. Shorten it."
            problems.append(Problem(f"row {number}", says))
    if problems:
        raise InputError("rows to score", problems)


def _with_labels(prompt: Sequence[int], continuation: Sequence[int]) -> Pair:
    return [*prompt, *continuation], [IGNORED] * len(prompt) + list(continuation)


def _of_rows(opened: Opened, rows: Sequence[Pair], batch_tokens: int) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in rows]
    for batch in _row_batches(rows, batch_tokens, opened.n_vocabulary * opened.n_members):
        ids_BT, mask_BT = _right_padded([rows[number][0] for number in batch], opened.device)
        labels_BT, _ = _right_padded([rows[number][1] for number in batch], opened.device, IGNORED)
        after_BT = torch.cat([labels_BT[:, 1:], torch.full_like(labels_BT[:, :1], IGNORED)], dim=1)
        keep_BT = after_BT != IGNORED
        logits_NV = opened.logits(ids_BT, mask_BT, None, keep_BT)
        values = _gathered(logits_NV, after_BT[keep_BT])
        for number, n_kept in zip(batch, keep_BT.sum(1).tolist(), strict=True):
            found[number] = list(islice(values, n_kept))
    return found


def _row_batches(rows: Sequence[Pair], batch_tokens: int, n_logits: int) -> Iterator[list[int]]:
    """Numbers of rows that share a batch, shortest first; rows without a supervised token are left out.

    `n_logits`: numbers that the head gives for each supervised token.
    """
    n_kept = [sum(label != IGNORED for label in labels) for _, labels in rows]
    batch: list[int] = []
    kept = 0
    for number in sorted((number for number, n in enumerate(n_kept) if n), key=lambda number: len(rows[number][0])):
        too_wide = (len(batch) + 1) * len(rows[number][0]) > batch_tokens
        if batch and (too_wide or (kept + n_kept[number]) * n_logits > _HEAD_NUMBERS):
            yield batch
            batch, kept = [], 0
        batch.append(number)
        kept += n_kept[number]
    if batch:
        yield batch


def _shared_batches(
    shared: Sequence[_Shared],
    rows: Sequence[Pair],
    batch_tokens: int,
    equal_lengths: bool,
) -> Iterator[list[_Shared]]:
    """Prompts that share a batch; a prompt with more rows than a batch holds comes in parts."""
    batch: list[_Shared] = []
    n_rows = longest = 0
    for one in sorted(shared, key=lambda one: len(one.prompt)):
        width = len(one.prompt) + max(len(rows[number][1]) for number in one.rows)
        n_part = max(1, batch_tokens // width)
        for start in range(0, len(one.rows), n_part):
            part = _Shared(one.prompt, one.rows[start : start + n_part])
            differs = equal_lengths and batch and len(batch[0].prompt) != len(part.prompt)
            if batch and (differs or (n_rows + len(part.rows)) * max(longest, width) > batch_tokens):
                yield batch
                batch, n_rows, longest = [], 0, 0
            batch.append(part)
            n_rows, longest = n_rows + len(part.rows), max(longest, width)
    if batch:
        yield batch


def _of_shared(opened: Opened, batch: Sequence[_Shared], rows: Sequence[Pair]) -> Iterator[tuple[int, list[float]]]:
    """Compute each prompt but its last token once, give its cache to all its rows, and go on with those."""
    heads_BT, head_mask_BT = _left_padded([one.prompt[:-1] for one in batch], opened.device)
    cache = opened.start(len(batch))
    opened.logits(heads_BT, head_mask_BT, cache)
    owner_B = torch.tensor([place for place, one in enumerate(batch) for _ in one.rows], device=opened.device)
    cache.reorder_cache(owner_B)  # type: ignore[arg-type]
    numbers = [number for one in batch for number in one.rows]
    tails = [[one.prompt[-1], *rows[number][1][:-1]] for one in batch for number in one.rows]
    tails_BT, tail_mask_BT = _right_padded(tails, opened.device)
    keep_BT = tail_mask_BT.bool()
    logits_NV = opened.logits(tails_BT, torch.cat([head_mask_BT[owner_B], tail_mask_BT], dim=1), cache, keep_BT)
    targets_N = torch.tensor([token for number in numbers for token in rows[number][1]], device=opened.device)
    values = _gathered(logits_NV, targets_N)
    for number in numbers:
        yield number, list(islice(values, len(rows[number][1])))


def _gathered(logits_NV: Tensor, targets_N: Tensor) -> Iterator[float]:
    logits_NV = logits_NV.float()
    return iter((logits_NV.gather(1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(-1)).tolist())


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device, pad: int = 0) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = [[*[0] * (longest - len(row)), *row] for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
