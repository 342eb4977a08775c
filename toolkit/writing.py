"""One answer in the making: how its next token is chosen, and which of its text can be shown.

What is chosen depends on the row's own logits, sampling and position, never on who is answered beside it.
"""

# R rows of a step, V vocabulary.

import functools
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from toolkit.grammar import GrammarError, Guide
from toolkit.sampling import Sampling, bent, choose, logprobs_of, masked, noise

Finish = Literal["stop", "length", "cancelled"]
_HALF = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
_BYTE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its text, the bytes it stands for (a character may lie in several tokens; its text is U+FFFD then), its
    log-probability by the model as it is, before any penalty or filter, and the likeliest tokens in its place."""

    id: int
    token: str
    bytes: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True)
class Answer:
    """One answer: its tokens without the end token, its text without what follows a stop string, and why it ended.

    logprobs: of every token, where they were asked for. routing: who answered, with weights, where several could have.
    """

    ids: tuple[int, ...]
    text: str
    finish: Finish
    n_prompt: int
    logprobs: tuple[TokenLogprob, ...] = ()
    routing: tuple[tuple[str, float], ...] = ()


class Writing:
    """An answer to `prompt` of at most `limit` tokens. ends: token ids that end it. number: which of several answers it
    is; each draws noise of its own. n_logprobs: how many likely tokens are told beside each one, None for nothing.
    guide: set for an answer that has to be of a given form; failure: why it cannot go on in that form.
    """

    guide: Guide | None = None
    failure: GrammarError | None = None

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        sampling: Sampling,
        limit: int,
        ends: AbstractSet[int],
        number: int = 0,
        n_logprobs: int | None = None,
    ) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.number, self.n_logprobs = number, n_logprobs
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish: Finish | None = None
        self.counts: dict[int, int] = {}
        self.limit, self._ends = limit, ends
        self._text: list[str] = []
        self._tokenizer = tokenizer
        self._reader, self._watch = Detokenizer(tokenizer), StopStrings(sampling.stop)
        self._measured: TokenLogprob | None = None

    @functools.cached_property
    def read(self) -> frozenset[int]:
        """The prompt's tokens."""
        return frozenset(self.prompt)

    @property
    def noise(self) -> float:
        """Where the next token lands in the cumulative probabilities."""
        return noise(self.sampling.seed, self.number, len(self.ids))

    def measure(self, logits_V: Tensor, token: int) -> None:
        """Note how likely the token is that is taken next, where that was asked for."""
        if self.n_logprobs is None:
            return
        spell = functools.partial(spelled, self._tokenizer)
        logprob, likely = logprobs_of(logits_V, token, self.n_logprobs)
        top = tuple(TokenLogprob(one, *spell(one), value) for one, value in likely)
        self._measured = TokenLogprob(token, *spell(token), logprob, top)

    def take(self, token: int) -> str:
        """Add a token; the text that can be shown now."""
        if token in self._ends:
            return self.end("stop")
        self.ids.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        if self._measured is not None:
            self.logprobs.append(self._measured)
            self._measured = None
        piece = self._watch.push(self._reader.push(token))
        self._text.append(piece)
        is_whole = self.guide is not None and self.guide.take(token)
        if self._watch.met:
            self.finish = "stop"
        elif is_whole:
            piece += self.end("stop")
        elif len(self.ids) >= self.limit:
            piece += self.end("length")
        return piece

    def end(self, finish: Finish) -> str:
        """No token comes any more; the text that was still held back."""
        rest = self._watch.push(self._reader.flush()) + self._watch.flush()
        self._text.append(rest)
        self.finish = "stop" if self._watch.met else finish
        return rest

    def answer(self, routing: tuple[tuple[str, float], ...] = ()) -> Answer:
        """The answer, whole."""
        text, finish = "".join(self._text), self.finish or "cancelled"
        return Answer(tuple(self.ids), text, finish, len(self.prompt), tuple(self.logprobs), routing)


def next_tokens(logits_RV: Tensor, writings: Sequence[Writing]) -> list[int | None]:
    """The next token of every row; None for a row whose logits are not numbers, or that has a `failure` now."""
    tokens: list[int | None] = [None] * len(writings)
    sums = logits_RV.sum(-1, dtype=torch.float32).tolist()
    broken = torch.isnan(logits_RV).any(-1).tolist() if any(map(math.isnan, sums)) else [False] * len(sums)
    may_RV = [
        None if is_broken else _may(one, logits_RV.shape[-1]) for one, is_broken in zip(writings, broken, strict=True)
    ]
    whole = [row for row, is_broken in enumerate(broken) if not is_broken and writings[row].failure is None]
    if not whole:
        return tokens
    own_RV = logits_RV if len(whole) == len(writings) else logits_RV[torch.tensor(whole, device=logits_RV.device)]
    answering = [writings[row] for row in whole]
    samplings = [writing.sampling for writing in answering]
    bent_RV = masked(bent(own_RV, samplings, answering), [may_RV[row] for row in whole])
    chosen = choose(bent_RV, samplings, [writing.noise for writing in answering])
    for place, (row, token) in enumerate(zip(whole, chosen, strict=True)):
        writings[row].measure(own_RV[place], token)
        tokens[row] = token
    return tokens


def _may(writing: Writing, n_vocabulary: int) -> Tensor | None:
    """Which tokens may come next, where not all may; an answer whose guide fails has its `failure` then."""
    if writing.guide is None:
        return None
    try:
        return torch.from_numpy(writing.guide.mask(n_vocabulary))
    except GrammarError as error:
        writing.failure = error
        return None


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


def spelled(tokenizer: Any, token: int) -> tuple[str, bytes]:
    """A token's text and bytes: of one that is part of a character its own bytes, of a special one its name."""
    if token in tokenizer.all_special_ids:
        name = str(tokenizer.convert_ids_to_tokens(token))
        return name, name.encode()
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]  # a tokenizer may take a space from the first
    before, both = (
        str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in (anchor, [*anchor, token])
    )
    text = both.removeprefix(before)
    if _HALF not in text:
        return text, text.encode()
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if (byte := _BYTE.fullmatch(piece)) is not None:
        own = bytes([int(byte[1], 16)])
    elif all(sign in _byte_signs() for sign in piece):
        own = bytes(_byte_signs()[sign] for sign in piece)
    else:
        own = text.encode()
    return own.decode("utf-8", "replace"), own


@functools.cache
def _byte_signs() -> Mapping[str, int]:
    """The signs that byte-level tokenizers write bytes as."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    signs: Callable[[], dict[int, str]] = bytes_to_unicode
    return {sign: byte for byte, sign in signs().items()}
