"""Answers, token by token: prefill, decode, and the only sampler.

Batched rows are left padded with explicit positions, so a row is computed as if it were alone (up to rounding, which
differs by batch shape). Its noise is a function of (seed, row, position), never of a shared stream, so a seeded answer
does not change with its neighbours. Cost: one forward pass a token for all rows that have not ended; a row that ends
leaves the batch.
"""

import unicodedata
from collections.abc import Callable, Generator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from toolkit.adapters.opened import Opened, measuring
from toolkit.errors import InputError, MaltuError, Problem

# B rows still alive, T new tokens, S tokens so far, V vocabulary.

Finish = Literal["stop", "length", "cancelled"]
_HALF = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 leave
    everything as it is.

    The filters come in this order: repetition penalty (over prompt and answer, arXiv 1909.05858), temperature, top_k,
    top_p (arXiv 1904.09751), min_p (arXiv 2407.01082). Raises: InputError with every value that is out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is out of range, all of it at once."""
        allowed = {
            "temperature": (0.0 <= self.temperature <= 100.0, "from 0 (greedy) to 100"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0, at most 1 (everything)"),
            "top_k": (self.top_k >= 0, "0 (everything) or more"),
            "min_p": (0.0 <= self.min_p < 1.0, "from 0 (everything), below 1"),
            "repetition_penalty": (0.0 < self.repetition_penalty < 100.0, "above 0, below 100; 1 changes nothing"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of strings, none of them empty"),
        }
        wrong = [(name, says) for name, (fits, says) in allowed.items() if not fits]
        if wrong:
            problems = [Problem(name, f"{getattr(self, name)!r} is out of range: {says}.") for name, says in wrong]
            raise InputError("sampling", problems)


@dataclass(frozen=True)
class Answer:
    """One answer: its tokens without the end token, its text without what follows a stop string, and why it ended."""

    ids: tuple[int, ...]
    text: str
    finish: Finish
    n_prompt: int


def generate(
    model: nn.Module | Opened,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    ends: AbstractSet[int] | None = None,
    on_token: Callable[[int, str], None] | None = None,
    batch_tokens: int = 8192,
) -> list[Answer]:
    """Answer every prompt, in the order given; prompts of like length share batches of at most `batch_tokens` cached
    tokens.

    `ends` are the ids that end an answer (default: `end_ids`). `on_token` gets (row, text piece) as pieces become
    certain. Raises: InputError for a prompt that is empty or leaves no room in the base's context; MaltuError if the
    logits are not numbers.
    """
    with _opened(model) as opened:
        stops = end_ids(opened.model, tokenizer) if ends is None else frozenset(ends)
        rows = _rows(opened, tokenizer, prompts, sampling)
        for batch in _batches(rows, batch_tokens, opened.needs_equal_lengths):
            for taken in _decode(opened, batch, sampling, stops):
                for row, piece in taken:
                    if on_token is not None and piece:
                        on_token(row.number, piece)
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
    with _opened(model) as opened:
        stops = end_ids(opened.model, tokenizer) if ends is None else frozenset(ends)
        rows = _rows(opened, tokenizer, [prompt_ids], sampling)
        steps = _decode(opened, rows, sampling, stops)
        while rows[0].finish is None:
            piece = rows[0].end("cancelled") if is_cancelled() else next(steps)[0][1]
            if piece:
                yield piece
    return rows[0].answer()


def end_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer: those of the generation config, the tokenizer's eos, and what the template puts after
    an answer.
    """
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
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


def choose(logits_BV: Tensor, sampling: Sampling, noise_B: Sequence[float], seen_BV: Tensor | None = None) -> list[int]:
    """The next token of every row. `noise_B` are numbers in [0, 1): where in the cumulative probabilities, in id order,
    a row lands.

    Id order, not rank order: two tokens that change rank by rounding alone do not change places. `seen_BV` marks the
    tokens that a repetition penalty weakens.
    """
    logits_BV = logits_BV.float()
    penalty = sampling.repetition_penalty
    if seen_BV is not None and penalty != 1.0:
        weakened = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = torch.where(seen_BV, weakened, logits_BV)
    if sampling.temperature < 1e-5:  # below it, float32 would overflow
        return logits_BV.argmax(-1).tolist()
    kept_BV = keep_likely(torch.softmax(logits_BV / sampling.temperature, dim=-1), sampling)
    reached_BV = kept_BV.double().cumsum(-1)
    landed_B1 = torch.tensor(noise_B, dtype=torch.float64, device=reached_BV.device)[:, None] * reached_BV[:, -1:]
    return torch.searchsorted(reached_BV, landed_B1, right=True)[:, 0].tolist()


def keep_likely(probs_BV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities with those that top_k, top_p and min_p leave out at 0; not renormalised. Equal probabilities share
    one fate.
    """
    if 0 < sampling.top_k < probs_BV.shape[-1]:
        floor_B1 = probs_BV.topk(sampling.top_k).values[:, -1:]
        probs_BV = probs_BV.where(probs_BV >= floor_B1, 0.0)
    if sampling.top_p < 1.0:
        probs_BV = probs_BV.where(probs_BV >= _nucleus_floor(probs_BV, sampling.top_p), 0.0)
    if sampling.min_p > 0.0:
        probs_BV = probs_BV.where(probs_BV >= sampling.min_p * probs_BV.amax(-1, keepdim=True), 0.0)
    return probs_BV


def _nucleus_floor(probs_BV: Tensor, top_p: float) -> Tensor:
    """The least probability inside the smallest set that holds a share `top_p`; sorts all of V only where the top 256
    do not reach it.
    """
    wanted_B1 = top_p * probs_BV.sum(-1, keepdim=True)
    top_BK = probs_BV.topk(min(256, probs_BV.shape[-1])).values
    if (top_BK.sum(-1, keepdim=True) < wanted_B1).any():
        top_BK = probs_BV.sort(-1, descending=True).values
    inside_BK = top_BK.cumsum(-1) - top_BK < wanted_B1
    return top_BK.where(inside_BK, float("inf")).amin(-1, keepdim=True)


def noise(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (a chain of splitmix64 finalisers over the three of
    them).
    """
    state = 0
    for word in (seed, row, position):
        state = ((state ^ (word & _MASK64)) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return (state >> 32) / 2**32


class Detokenizer:
    """Text from tokens as they come: a piece is given out once no later token can change it, so never half a character.

    Works on any tokenizer through its own `decode` over a few tokens: those not yet certain, and the piece before them,
    which decides about spaces. Special tokens are silent. Cost: constant a token, whatever the length of the answer.
    """

    _patience = 12  # tokens: a character has at most 4 bytes, so bytes that stay undecided for longer are none

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._silent = frozenset(tokenizer.all_special_ids)
        self._certain: list[int] = []
        self._open: list[int] = []
        self._n_given = 0

    def push(self, token: int) -> str:
        """Take a token; what became certain with it, often "" inside a character."""
        if token in self._silent:
            return ""
        self._open.append(token)
        text = self._decode(self._certain + self._open)
        certain = text.rstrip(_HALF)
        piece = certain[self._n_given :]
        self._n_given = max(self._n_given, len(certain))
        if certain == text and certain:
            self._settle(self._open, [])
        elif len(self._open) > self._patience:
            piece += self._decode(self._certain + self._open[:-3])[self._n_given :]
            self._settle(self._open[:-3], self._open[-3:])
        return piece

    def flush(self) -> str:
        """The answer is over: whatever was held back, broken bytes as U+FFFD."""
        rest = self._decode(self._certain + self._open)[self._n_given :]
        self._settle([], [])
        return rest

    def _settle(self, certain: list[int], still_open: list[int]) -> None:
        self._certain, self._open, self._n_given = certain, still_open, len(self._decode(certain))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""


class StopStrings:
    """Watches text for stop strings: holds back what may be the beginning of one, and says when one is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(unicodedata.normalize("NFC", stop) for stop in stops)
        self._held = ""
        self.met = False

    def push(self, piece: str) -> str:
        """Take text; what can be shown of it. Once `met`, nothing more is shown."""
        if self.met:
            return ""
        text = self._held + piece
        cuts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if cuts:
            self.met, self._held = True, ""
            return text[: min(cuts)]
        n_held = max((self._n_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def flush(self) -> str:
        """The text is over: what was held back is no stop string after all."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _n_begun(text: str, stop: str) -> int:
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class _Row:
    """One answer in the making."""

    def __init__(self, number: int, prompt: Sequence[int], limit: int, reader: Detokenizer, watch: StopStrings) -> None:
        self.number, self.prompt, self.limit = number, prompt, limit
        self.ids: list[int] = []
        self.text: list[str] = []
        self.finish: Finish | None = None
        self._reader, self._watch = reader, watch

    def take(self, token: int, ends: AbstractSet[int]) -> str:
        """Add a token; the text that can be shown now."""
        if token in ends:
            return self.end("stop")
        self.ids.append(token)
        piece = self._watch.push(self._reader.push(token))
        self.text.append(piece)
        if self._watch.met:
            self.finish = "stop"
        elif len(self.ids) >= self.limit:
            piece += self.end("length")
        return piece

    def end(self, finish: Finish) -> str:
        """No token comes any more; the text that was still held back."""
        rest = self._watch.push(self._reader.flush()) + self._watch.flush()
        self.text.append(rest)
        self.finish = "stop" if self._watch.met else finish
        return rest

    def answer(self) -> Answer:
        return Answer(tuple(self.ids), "".join(self.text), self.finish or "cancelled", len(self.prompt))


def _opened(model: nn.Module | Opened) -> AbstractContextManager[Opened]:
    """A model opened here; one that its caller opened (several adapters that answer as one) stays the caller's."""
    return nullcontext(model) if isinstance(model, Opened) else measuring(model)


def _rows(opened: Opened, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[_Row]:
    problems, rows = [], []
    for number, prompt in enumerate(prompts):
        room = sampling.max_tokens if opened.context is None else opened.context - len(prompt)
        if not prompt:
            problems.append(Problem(f"prompt {number}", "has no tokens. Give it at least one."))
        elif room < 1:
            says = f"has {len(prompt)} tokens; the base holds {opened.context}, the answer included. Shorten it."
            problems.append(Problem(f"prompt {number}", says))
        else:
            limit = min(sampling.max_tokens, room)
            rows.append(_Row(number, prompt, limit, Detokenizer(tokenizer), StopStrings(sampling.stop)))
    if problems:
        raise InputError("prompts", problems)
    return rows


def _batches(rows: Sequence[_Row], batch_tokens: int, equal_lengths: bool) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
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


def _decode(
    opened: Opened, rows: Sequence[_Row], sampling: Sampling, ends: AbstractSet[int]
) -> Iterator[list[tuple[_Row, str]]]:
    """After every step the rows that took a token, each with the text it may show; over when every row has ended."""
    alive = list(rows)
    ids_BT, mask_BS = _left_padded([row.prompt for row in alive], opened.device)
    seen_BV = _seen(opened, alive) if sampling.repetition_penalty != 1.0 else None
    cache = opened.start(len(alive))
    while alive:
        logits_BV = opened.logits(ids_BT, mask_BS, cache)
        if torch.isnan(logits_BV).any():
            raise MaltuError(
                "the model's output is not a number: its training diverged. Train again with a lower rate."
            )
        noise_B = [noise(sampling.seed, row.number, len(row.ids)) for row in alive]
        tokens = choose(logits_BV, sampling, noise_B, seen_BV)
        yield [(row, row.take(token, ends)) for row, token in zip(alive, tokens, strict=True)]
        ids_BT = torch.tensor(tokens, device=opened.device)[:, None]
        if seen_BV is not None:
            seen_BV = seen_BV.scatter(1, ids_BT, True)
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(alive), 1)], dim=1)
        left = [place for place, row in enumerate(alive) if row.finish is None]
        if len(left) < len(alive):
            alive = [alive[place] for place in left]
            places = torch.tensor(left, dtype=torch.long, device=opened.device)
            ids_BT, mask_BS = ids_BT[places], mask_BS[places]
            seen_BV = None if seen_BV is None else seen_BV[places]
            cache.reorder_cache(cast(torch.LongTensor, places))


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _seen(opened: Opened, rows: Sequence[_Row]) -> Tensor:
    seen_BV = torch.zeros(len(rows), opened.n_vocabulary, dtype=torch.bool, device=opened.device)
    for place, row in enumerate(rows):
        seen_BV[place, torch.tensor(row.prompt, device=opened.device)] = True
    return seen_BV
