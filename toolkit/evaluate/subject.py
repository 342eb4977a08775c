"""Who is measured: one model, or several that answer as one. A judge asks these four things and no more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from toolkit.adapters.opened import Opened
from toolkit.corpus.render import Rendered, Renderer
from toolkit.corpus.talk import Talk
from toolkit.evaluate.classify import classify_talks
from toolkit.evaluate.spoken import Pair, PairBits, bits_on_pairs
from toolkit.evaluate.talk import HeldOut, Prompt, Sample, answer_prompts, held_out_loss
from toolkit.generate import Sampling


class Subject(Protocol):
    """What can be asked of whoever is measured. None: it has no such thing (a vote of whole answers has no loss)."""

    def held_out(self, rows: Sequence[Rendered], langs: Sequence[str | None]) -> HeldOut | None:
        """The loss of rendered talks, in their order."""

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sample]:
        """An answer to every prompt, in order."""

    def labelled(self, talks: Sequence[Talk], labels: Sequence[str]) -> list[dict[str, float]]:
        """For every labelled talk the probability of each label."""

    def bits(self, pairs: Sequence[Pair], *, as_answer: bool) -> dict[str, PairBits] | None:
        """Bits per byte on spoken and written text that says the same."""


@dataclass(frozen=True)
class OneModel:
    """A model, or one opened for measuring. See Subject."""

    model: nn.Module | Opened
    tokenizer: Any
    renderer: Renderer

    def held_out(self, rows: Sequence[Rendered], langs: Sequence[str | None]) -> HeldOut | None:
        """See Subject."""
        return held_out_loss(self.model, self.tokenizer, rows, langs)

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sample]:
        """See Subject."""
        return answer_prompts(self.model, self.tokenizer, self.renderer, prompts, sampling)

    def labelled(self, talks: Sequence[Talk], labels: Sequence[str]) -> list[dict[str, float]]:
        """See Subject."""
        return classify_talks(self.model, self.renderer, talks, labels)

    def bits(self, pairs: Sequence[Pair], *, as_answer: bool) -> dict[str, PairBits] | None:
        """See Subject."""
        return bits_on_pairs(self.model, self.tokenizer, self.renderer, pairs, as_answer=as_answer)
