"""One answer in the making: how its next token is chosen, and which of its text can be shown.

What is chosen depends on the row's own logits, sampling and position, never on who is answered beside it.
"""

# R rows of a step, V vocabulary.

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from toolkit.generate import Answer, Detokenizer, Finish, Sampling, StopStrings, choose, noise

_Filters = tuple[float, float, int, float, float]


class Writing:
    """An answer to `prompt` of at most `limit` tokens. ends: token ids that end it."""

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], sampling: Sampling, limit: int, ends: AbstractSet[int]
    ) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self._limit, self._ends = limit, ends
        self._text: list[str] = []
        self._reader, self._watch = Detokenizer(tokenizer), StopStrings(sampling.stop)
        self._seen_V: Tensor | None = None

    @property
    def filters(self) -> _Filters:
        """What has to be equal for two answers to be sampled in one call; a greedy one filters nothing."""
        own = self.sampling
        if own.temperature < 1e-5:
            return 0.0, 1.0, 0, 0.0, own.repetition_penalty
        return own.temperature, own.top_p, own.top_k, own.min_p, own.repetition_penalty

    @property
    def noise(self) -> float:
        """Where the next token lands in the cumulative probabilities."""
        return noise(self.sampling.seed, 0, len(self.ids))

    def seen(self, like_V: Tensor) -> Tensor:
        """The tokens of prompt and answer so far, as a mask."""
        if self._seen_V is None:
            self._seen_V = torch.zeros(like_V.shape, dtype=torch.bool, device=like_V.device)
            self._seen_V[torch.tensor(list(self.prompt), device=like_V.device)] = True
        if self.ids:
            self._seen_V[self.ids[-1]] = True
        return self._seen_V

    def take(self, token: int) -> str:
        """Add a token; the text that can be shown now."""
        if token in self._ends:
            return self.end("stop")
        self.ids.append(token)
        piece = self._watch.push(self._reader.push(token))
        self._text.append(piece)
        if self._watch.met:
            self.finish = "stop"
        elif len(self.ids) >= self._limit:
            piece += self.end("length")
        return piece

    def end(self, finish: Finish) -> str:
        """No token comes any more; the text that was still held back."""
        rest = self._watch.push(self._reader.flush()) + self._watch.flush()
        self._text.append(rest)
        self.finish = "stop" if self._watch.met else finish
        return rest

    def answer(self) -> Answer:
        """The answer, whole."""
        return Answer(tuple(self.ids), "".join(self._text), self.finish or "cancelled", len(self.prompt))


def next_tokens(logits_RV: Tensor, writings: Sequence[Writing]) -> list[int | None]:
    """The next token of every row; None for a row whose logits are not numbers. Rows of like sampling share a call."""
    together: dict[_Filters, list[int]] = {}
    tokens: list[int | None] = [None] * len(writings)
    sums = logits_RV.sum(-1, dtype=torch.float32).tolist()
    broken = torch.isnan(logits_RV).any(-1).tolist() if any(map(math.isnan, sums)) else [False] * len(sums)
    for row, writing in enumerate(writings):
        if not broken[row]:
            together.setdefault(writing.filters, []).append(row)
    for filters, rows in together.items():
        own_RV = logits_RV if len(rows) == len(writings) else logits_RV[torch.tensor(rows, device=logits_RV.device)]
        seen_RV = torch.stack([writings[row].seen(logits_RV[row]) for row in rows]) if filters[-1] != 1.0 else None
        chosen = choose(own_RV, writings[rows[0]].sampling, [writings[row].noise for row in rows], seen_RV)
        for row, token in zip(rows, chosen, strict=True):
            tokens[row] = token
    return tokens
