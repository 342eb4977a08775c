"""How spoken is a model? Bits per byte on spoken against written text that says the same, and how many sentences of
what it generates are spoken.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from toolkit.adapters.opened import Opened
from toolkit.bases.spoken import Manner, manner_by_language, score_with_language, sentences
from toolkit.bases.spoken_features import language_of
from toolkit.corpus.render import Renderer
from toolkit.corpus.row import cut
from toolkit.corpus.rows import read_rows
from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import DataError, Problem
from toolkit.evaluate.metrics import bits_per_byte, nfc
from toolkit.evaluate.talk import HeldOut, Sample, held_out_loss

SHIPPED_PAIRS = ("maltu:speech/register.ko.jsonl", "maltu:speech/register.en.jsonl")
# What the user says before an answer whose manner is asked for: it names nothing and leans to neither side.
OPENINGS: Mapping[str, str] = {"ko": "무슨 일?", "en": "What's new?"}


@dataclass(frozen=True)
class Pair:
    """One thing said in both manners."""

    lang: str
    spoken: str
    written: str


@dataclass(frozen=True)
class PairBits:
    """Bits per byte on either side of some pairs. Where `written` is over `spoken`, the model expects speech."""

    n: int
    spoken: float
    written: float

    @property
    def margin(self) -> float:
        """By how many bits per byte speech comes easier than writing."""
        return self.written - self.spoken


def read_pairs(files: Sequence[str] = SHIPPED_PAIRS) -> list[Pair]:
    """Pairs of files with `spoken`, `written` and perhaps `lang`. Raises: DataError with every row that is none, and
    where there is not one.
    """
    pairs: list[Pair] = []
    problems: list[Problem] = []
    for file in files:
        for row in read_rows(file):
            found = row if isinstance(row, Problem) else _pair(row.where, row.value)
            pairs.append(found) if isinstance(found, Pair) else problems.append(found)
    if not pairs and not problems:
        problems = [Problem("", "holds no spoken text to measure on. Give rows with 'spoken' and 'written'.")]
    if problems:
        raise DataError(files[0] if len(files) == 1 else f"{len(files)} files", problems)
    return pairs


def _pair(where: str, value: Mapping[str, object]) -> Pair | Problem:
    spoken, written, lang = value.get("spoken"), value.get("written"), value.get("lang")
    if not isinstance(spoken, str) or not isinstance(written, str) or not spoken.strip() or not written.strip():
        return Problem(where, f"needs 'spoken' and 'written', two texts that say the same. Found: {cut(repr(value))}")
    of_pair = lang if isinstance(lang, str) else language_of(spoken)
    return Pair(of_pair or "other", nfc(spoken), nfc(written))


def some_pairs(pairs: Sequence[Pair], n_each: int) -> list[Pair]:
    """At most n_each pairs of each language, spread evenly over all of them."""
    found: list[Pair] = []
    for lang in dict.fromkeys(pair.lang for pair in pairs):
        mine = [pair for pair in pairs if pair.lang == lang]
        found += [mine[at * len(mine) // n_each] for at in range(n_each)] if len(mine) > n_each else mine
    return found


def bits_on_pairs(
    model: nn.Module | Opened, tokenizer: Any, renderer: Renderer, pairs: Sequence[Pair], *, as_answer: bool = True
) -> dict[str, PairBits]:
    """Bits per byte on the spoken and on the written sides, of all pairs and of each language.

    as_answer: as what the assistant answers to OPENINGS; else as running text (for a base that never chatted). A pair
    with a side that the template or max_length leaves no place for is left out on both sides.
    Raises: DataError where no pair is left.
    """
    sides = [
        list(renderer.training_all([_talk(pair, text, as_answer) for pair, text in of_side]))
        for of_side in ([(pair, pair.spoken) for pair in pairs], [(pair, pair.written) for pair in pairs])
    ]
    kept = [at for at, rows in enumerate(zip(*sides, strict=True)) if all(row.n_content for row in rows)]
    if not kept:
        says = f"none of {len(pairs)} pairs of spoken and written text fits the model's template and length."
        raise DataError("spoken", [Problem("", f"{says} Raise train.max_length, or leave the metric spoken out.")])
    langs = [pairs[at].lang for at in kept]
    spoken, written = (held_out_loss(model, tokenizer, [rows[at] for at in kept], langs) for rows in sides)
    by_spoken, by_written = spoken.by_language(), written.by_language()
    return {
        "all": _bits(spoken, written),
        **{lang: _bits(of, by_written[lang]) for lang, of in by_spoken.items()},
    }


def _talk(pair: Pair, text: str, as_answer: bool) -> Talk:
    if not as_answer:
        return Talk((Turn("text", text),), "pairs", lang=pair.lang)
    return Talk(
        (Turn("user", OPENINGS.get(pair.lang, OPENINGS["en"])), Turn("assistant", text)), "pairs", lang=pair.lang
    )


def _bits(spoken: HeldOut, written: HeldOut) -> PairBits:
    sums = [
        (sum(of.content_nll for of in side.talks), sum(of.n_bytes for of in side.talks)) for side in (spoken, written)
    ]
    return PairBits(len(spoken.talks), *(bits_per_byte(*of_side) for of_side in sums))


def spoken_sentences(samples: Sequence[Sample]) -> dict[str, Manner]:
    """The manner of the sentences that answers hold, together and by the prompt's language; `share` is what is spoken.

    A sentence is judged in the language that it is in, so that an answer in the other language is judged as that.
    """
    by_prompt: dict[str, list[tuple[Any, float]]] = {}
    for sample in samples:
        scored = score_with_language(sentences(sample.answer))
        by_prompt.setdefault(sample.prompt.lang or "", []).extend(scored)
    found = {"all": manner_by_language([one for scored in by_prompt.values() for one in scored])["all"]}
    for lang, scored in sorted(by_prompt.items()):
        if lang:
            found[lang] = manner_by_language(scored)["all"]
    return found


def spoken_numbers(samples: Sequence[Sample], pairs: Mapping[str, PairBits]) -> dict[str, dict[str, float]]:
    """The numbers of the metric `spoken`, each by language: the share of spoken sentences in the answers, and bits per
    byte on either side of the pairs. A number that was not measured is left out.
    """
    shares = {lang: of.share for lang, of in spoken_sentences(samples).items() if not math.isnan(of.share)}
    found = {
        "spoken sentences": shares,
        "spoken bits per byte": {lang: of.spoken for lang, of in pairs.items()},
        "written bits per byte": {lang: of.written for lang, of in pairs.items()},
    }
    return {name: of for name, of in found.items() if of}
