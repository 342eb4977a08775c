"""What is measured of a candidate: held-out talk conversation by conversation, how spoken, how fast, how large."""

import math
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from toolkit.bases.load import LoadedBase
from toolkit.corpus.render import Rendered, Renderer
from toolkit.corpus.talk import Talk
from toolkit.evaluate.classify import gold_labels
from toolkit.evaluate.metrics import nfc
from toolkit.evaluate.spoken import Pair, PairBits
from toolkit.evaluate.subject import OneModel
from toolkit.evaluate.talk import HeldOut, Prompt, Sample
from toolkit.generate import Sampling, generate

N_NEW, N_TIMED = 32, 3  # tokens of a timed answer, and how often it is timed
LEAST = 1e-15  # as metrics.log_loss


class Noted:
    """One model as somebody to measure (toolkit.evaluate.subject.Subject) who keeps what it was asked."""

    def __init__(self, model: nn.Module, base: LoadedBase, renderer: Renderer) -> None:
        self._one = OneModel(model, base.tokenizer, renderer)
        self.held: HeldOut | None = None
        self.samples: list[Sample] = []
        self.said: list[dict[str, float]] = []

    def held_out(self, rows: Sequence[Rendered], langs: Sequence[str | None]) -> HeldOut | None:
        """The loss of rendered talks, in their order."""
        self.held = self._one.held_out(rows, langs)
        return self.held

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sample]:
        """An answer to every prompt, in order."""
        self.samples = self._one.answers(prompts, sampling)
        return self.samples

    def labelled(self, talks: Sequence[Talk], labels: Sequence[str]) -> list[dict[str, float]]:
        """For every labelled talk the probability of each label."""
        self.said = self._one.labelled(talks, labels)
        return self.said

    def bits(self, pairs: Sequence[Pair], *, as_answer: bool) -> dict[str, PairBits] | None:
        """Bits per byte on spoken and written text that says the same."""
        return self._one.bits(pairs, as_answer=as_answer)


def bits_by_talk(held: HeldOut) -> list[float]:
    """Bits of the content of each talk."""
    return [of.content_nll / math.log(2) for of in held.talks]


def nats_by_text(talks: Sequence[Talk], said: Sequence[dict[str, float]]) -> list[float]:
    """For each labelled text how surprised its gold label leaves the model."""
    pairs = zip(gold_labels(talks), said, strict=True)
    return [-math.log(max(of.get(label, 0.0), LEAST)) for label, of in pairs]


def content_bytes(talk: Talk) -> int:
    """UTF-8 bytes of what a model learns to say in a talk, in NFC: the same whatever its tokenizer does."""
    return sum(len(nfc(turn.content).encode()) for turn in talk.turns if turn.role in ("assistant", "text"))


def speeds(model: nn.Module, base: LoadedBase, prompt: Sequence[int]) -> tuple[float, float] | None:
    """Milliseconds to the first token of an answer to this prompt, and tokens a second after it, alone and greedy.

    Medians of three; None where prompt and answer do not fit into the context. Cost: about a hundred tokens.
    """
    if len(prompt) + N_NEW + 1 > base.context:
        return None

    def timed(n_tokens: int) -> float:
        asked = Sampling(temperature=0.0, max_tokens=n_tokens)
        started = time.perf_counter()
        generate(model, base.tokenizer, [prompt], asked, ends=frozenset())
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    timed(2)  # warms up
    rounds = [(timed(1), timed(N_NEW + 1)) for _ in range(N_TIMED)]
    first = statistics.median(one for one, _ in rounds)
    rest = statistics.median(max(both - one, 1e-6) for one, both in rounds)
    return 1000 * first, N_NEW / rest
