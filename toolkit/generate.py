"""Answers, token by token: prefill and decode.

Batched rows are left padded with explicit positions, so a row is computed as if it were alone (up to rounding, which
differs by batch shape). Its noise is a function of (seed, row, position), never of a shared stream, so a seeded answer
does not change with its neighbours. Cost: one forward pass a token for all rows that have not ended; a row that ends
leaves the batch. How a token is chosen: toolkit/sampling.py; what of the text can be shown: toolkit/writing.py.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from toolkit.adapters.opened import Opened, measuring
from toolkit.errors import InputError, MaltuError, Problem
from toolkit.sampling import Sampling as Sampling
from toolkit.writing import Answer as Answer
from toolkit.writing import Finish as Finish
from toolkit.writing import TokenLogprob as TokenLogprob
from toolkit.writing import Writing, next_tokens

# B rows still alive, T new tokens, S tokens so far, V vocabulary.


def generate(
    model: nn.Module | Opened,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    ends: AbstractSet[int] | None = None,
    batch_tokens: int = 8192,
) -> list[Answer]:
    """Answer every prompt, in the order given; prompts of like length share batches of at most `batch_tokens` cached
    tokens.

    `ends` are the ids that end an answer (default: `end_ids`). Raises: InputError for a prompt that is empty or leaves
    no room in the base's context; MaltuError if the logits are not numbers.
    """
    with measuring(model) as opened:
        stops = end_ids(opened, tokenizer) if ends is None else frozenset(ends)
        rows = _rows(opened, tokenizer, prompts, sampling, stops)
        for batch in _batches(rows, batch_tokens, opened.needs_equal_lengths):
            for _ in _decode(opened, batch):
                pass
    return [row.answer() for row in rows]


def stream(
    model: nn.Module | Opened,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    is_cancelled: Callable[[], bool] = lambda: False,
    ends: AbstractSet[int] | None = None,
) -> Generator[str, None, Answer]:
    """Text pieces of one answer as they become certain; they join to its text. Row 0 of `generate` with this prompt
    says the same.

    A piece never splits a character and never holds part of a stop string. `is_cancelled` is asked before every token.
    The generator returns the Answer (`answer = yield from stream(…)`). Raises: what `generate` raises.
    """
    with measuring(model) as opened:
        stops = end_ids(opened, tokenizer) if ends is None else frozenset(ends)
        row = _rows(opened, tokenizer, [prompt_ids], sampling, stops)[0]
        yield from write(opened, row, is_cancelled)
    return row.answer()


def write(
    model: nn.Module | Opened, row: Writing, is_cancelled: Callable[[], bool] = lambda: False
) -> Generator[str, None, None]:
    """Pieces of an answer that somebody prepared, until it is finished; `row.answer()` is the whole. See `stream`."""
    with measuring(model) as opened:
        steps = _decode(opened, [row])
        while row.finish is None:
            piece = row.end("cancelled") if is_cancelled() else next(steps)[0][1]
            if piece:
                yield piece


def end_ids(model: nn.Module | Opened, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer: those of the generation config, the tokenizer's eos, and what the template puts after
    an answer.
    """
    found: set[int] = set()
    base = model.model if isinstance(model, Opened) else model
    for holder in (getattr(base, "generation_config", None), getattr(base, "config", None), tokenizer):
        eos = getattr(holder, "eos_token_id", None)
        found.update([eos] if isinstance(eos, int) else eos or [])
    if getattr(tokenizer, "chat_template", None):
        talk = [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "반가워"}]
        try:
            after = tokenizer.apply_chat_template(talk, tokenize=False).rpartition("반가워")[2]
        except TemplateError:
            after = ""  # a template that refuses this little talk names no end of turn; the others still hold
        first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        found.update(set(first) & (set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())))
    return frozenset(found)


def _rows(
    opened: Opened, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, ends: AbstractSet[int]
) -> list[Writing]:
    sampling.check_vocabulary(opened.n_vocabulary)
    problems, rows = [], []
    for number, prompt in enumerate(prompts):
        room = sampling.max_tokens if opened.context is None else opened.context - len(prompt)
        if not prompt:
            problems.append(Problem(f"prompt {number}", "has no tokens. Give it at least one."))
        elif room < 1:
            says = f"has {len(prompt)} tokens; the base holds {opened.context}, the answer included. Shorten it."
            problems.append(Problem(f"prompt {number}", says))
        else:
            rows.append(Writing(tokenizer, prompt, sampling, min(sampling.max_tokens, room), ends, number))
    if problems:
        raise InputError("prompts", problems)
    return rows


def _batches(rows: Sequence[Writing], batch_tokens: int, equal_lengths: bool) -> Iterator[list[Writing]]:
    batch: list[Writing] = []
    longest = 0
    for row in sorted(rows, key=lambda row: len(row.prompt)):
        grown = max(longest, len(row.prompt) + row.limit)
        differs = equal_lengths and batch and len(batch[0].prompt) != len(row.prompt)
        if batch and (differs or grown * (len(batch) + 1) > batch_tokens):
            yield batch
            batch, grown = [], len(row.prompt) + row.limit
        batch.append(row)
        longest = grown
    if batch:
        yield batch


def _decode(opened: Opened, rows: Sequence[Writing]) -> Iterator[list[tuple[Writing, str]]]:
    """After every step the rows that took a token, each with the text it may show; over when every row has ended."""
    alive = list(rows)
    ids_BT, mask_BS = _left_padded([row.prompt for row in alive], opened.device)
    cache = opened.start(len(alive))
    while alive:
        tokens = [token for token in next_tokens(opened.logits(ids_BT, mask_BS, cache), alive) if token is not None]
        if len(tokens) < len(alive):
            raise MaltuError(
                "the model's output is not a number: its training diverged. Train again with a lower rate."
            )
        yield [(row, row.take(token)) for row, token in zip(alive, tokens, strict=True)]
        ids_BT = torch.tensor(tokens, device=opened.device)[:, None]
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(alive), 1)], dim=1)
        left = [place for place, row in enumerate(alive) if row.finish is None]
        if len(left) < len(alive):
            alive = [alive[place] for place in left]
            places = torch.tensor(left, dtype=torch.long, device=opened.device)
            ids_BT, mask_BS = ids_BT[places], mask_BS[places]
            cache.reorder_cache(cast(torch.LongTensor, places))


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
