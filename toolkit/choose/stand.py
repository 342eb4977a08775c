"""Where one candidate is measured: the held-out talk, its rows on this base, and who judges them."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from toolkit.bases.load import LoadedBase
from toolkit.choose.lesson import some
from toolkit.choose.measure import Noted, bits_by_talk, content_bytes, nats_by_text
from toolkit.corpus.gather import Corpus
from toolkit.corpus.render import Renderer
from toolkit.errors import DataError, Problem
from toolkit.evaluate.classify import label_set
from toolkit.evaluate.spoken import PairBits, read_pairs, some_pairs
from toolkit.evaluate.talk import Prompt
from toolkit.fit.prepare import Rows
from toolkit.judge import Held, Judge, guess_language, metrics_of, prompts_of, sampling_of
from toolkit.recipe.model import Recipe

N_TALKS = 400  # held-out conversations that are measured, spread evenly over all
N_PROMPTS = 24  # prompts that are answered
N_PAIRS = 50  # pairs of spoken and written text in each language
BITS, NATS = "bits per byte", "log loss"


class Stand:
    """`recipe`: that of the candidate (audition.recipe_of). measure: what candidates are ranked by.

    Raises: DataError where no held-out conversation has anything to measure on this base.
    """

    def __init__(self, recipe: Recipe, base: LoadedBase, renderer: Renderer, corpus: Corpus, rows: Rows) -> None:
        self.base, self.renderer, self.recipe = base, renderer, recipe
        self.is_classifier = recipe.task == "classify"
        self.measure = NATS if self.is_classifier else BITS
        part, held = rows.held_out()
        numbered = [(number, row) for number, row in zip(rows.kept_talks[part], held, strict=True) if row.n_content]
        if not numbered:
            says = "no held-out conversation is left to measure on. Set data.test: 0.1, or a longer train.max_length"
            raise DataError(recipe.name, [Problem("data.test", says)])
        self.n_all = len(numbered)
        numbered = some(numbered, N_TALKS)
        self.numbers, self.rows = [number for number, _ in numbered], [row for _, row in numbered]
        self._talks = [getattr(corpus, part)[number] for number in self.numbers]
        labels = label_set(corpus.train) if self.is_classifier else ()
        held_talk = Held(tuple(self._talks), tuple(self.rows), some_prompts(recipe), labels, (), metrics_of(recipe))
        self.judge = Judge(recipe.task, base, renderer, held_talk, sampling_of(recipe))

    def noted(self, model: nn.Module) -> Noted:
        """A model that remembers what it was asked."""
        return Noted(model, self.base, self.renderer)

    def measured(self, model: nn.Module) -> tuple[Noted, dict[str, dict[str, float]]]:
        """Every number by language, without the answers."""
        noted = self.noted(model)
        found = self.judge.measure(noted)
        return noted, {name: finite(of) for name, of in found.items() if name not in ("samples", "confusion")}

    def sums(self, noted: Noted) -> list[float]:
        """The measure's sum of each talk; asked of the model where it was not yet."""
        if self.is_classifier:
            said = noted.said or noted.labelled(self._talks, self.judge.held.labels)
            return nats_by_text(self._talks, said)
        held = noted.held or noted.held_out(self.rows, self.judge.langs())
        return bits_by_talk(held) if held else []

    def talks(self, after: Sequence[float], before: Sequence[float]) -> dict[str, tuple[float, float, float]]:
        """Sums and count of each talk that this base saw whole, as result.py wants them."""
        counts = [1 if self.is_classifier else content_bytes(talk) for talk in self._talks]
        told = zip(self.numbers, self.rows, after, before, counts, strict=True)
        return {str(number): (a, b, float(n)) for number, row, a, b, n in told if not row.n_left_out}

    def bits(self, noted: Noted) -> dict[str, PairBits]:
        """Bits per byte on spoken and on written text that says the same, in the languages of this talk; empty where
        there are no pairs in them, or no place for pairs in the template, or labels are what is said.
        """
        if self.is_classifier:
            return {}
        pairs = some_pairs([pair for pair in read_pairs() if pair.lang in self._langs()], N_PAIRS)
        with contextlib.suppress(DataError):
            return noted.bits(pairs, as_answer=self.renderer.learn == "assistant") or {}
        return {}

    def prompt_ids(self) -> list[int]:
        """What the timed answers answer."""
        prompts = self.judge.held.prompts
        turns = prompts[0].turns if prompts else tuple(turn for turn in self._talks[0].turns if turn.role == "user")[:1]
        return list(self.renderer.prompt(turns or self._talks[0].turns))

    def bytes_per_token(self) -> float:
        """Of held-out content, on this base's tokenizer."""
        n_tokens = sum(row.n_content for row in self.rows)
        return sum(content_bytes(talk) for talk in self._talks) / max(1, n_tokens)

    def notes(self) -> tuple[str, ...]:
        """What of the talk was not measured, in words."""
        found = []
        if len(self.rows) < self.n_all:
            found.append(f"{len(self.rows):,} of {self.n_all:,} held-out conversations were measured")
        cut = sum(bool(row.n_left_out) for row in self.rows)
        if cut:
            found.append(f"{cut} conversations do not fit whole into its context and are not compared")
        return tuple(found)

    def _langs(self) -> set[str]:
        told = [prompt.lang for prompt in self.judge.held.prompts]
        return {lang for lang in (*told, *(talk.lang or guess_language(talk) for talk in self._talks)) if lang}


def some_prompts(recipe: Recipe) -> tuple[Prompt, ...]:
    """At most N_PROMPTS of the recipe's prompts, spread evenly over all of them."""
    return tuple(some(prompts_of(recipe), N_PROMPTS))


def margins(when: str, bits: Mapping[str, PairBits]) -> dict[str, float]:
    """By how many bits per byte spoken text comes easier than written, by «when language»."""
    return {f"{when} {lang}": of.margin for lang, of in bits.items() if math.isfinite(of.margin)}


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of them that are numbers."""
    return {lang: float(of) for lang, of in values.items() if isinstance(of, int | float) and math.isfinite(of)}
