"""How spoken is a text? A small classifier, spoken or written, for Korean and English; calibrated, and learned from
the data that ships alone (spoken_train.py). Scoring needs numpy and nothing heavier.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from toolkit.bases.spoken_features import LANGUAGES, UNSEEN, Language, Tables, language_of, names, numbers, plain
from toolkit.errors import BaseError, InputError, Problem
from toolkit.shipped import shipped

VERSION = 1
WEIGHTS, FACTS = "spoken.safetensors", "spoken.json"  # in data/spoken/
REBUILD = "python -m toolkit.bases.spoken_train"
FARTHEST = 5.0  # standard deviations; a number farther off counts as this far
SPOKEN_FROM = 0.5  # a text of this score or more is called spoken
_SENTENCE_END = re.compile(r"[.!?…。！？]+[\"'”’)\]」』]*(?=\s|$|[가-힣])|\n+")


@dataclass(frozen=True, eq=False)
class Scorer:
    """The classifier of one language. Weights belong to numbers brought to mean 0 and deviation 1 (`mean`, `scale`)."""

    lang: Language
    tables: Tables
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weights: NDArray[np.float64]
    bias: float

    def score(self, text: str) -> float:
        """0 (written) to 1 (spoken); not a number where the text holds no word."""
        cleaned = plain(text)
        if not cleaned.strip():
            return math.nan
        return _chance(self.logit(np.array([numbers(cleaned, self.lang, self.tables)])).item())

    def logit(self, numbers_NF: NDArray[np.float64]) -> NDArray[np.float64]:
        """The logarithm of the odds of being spoken, of N texts by their F numbers."""
        return standard(numbers_NF, self.mean, self.scale) @ self.weights + self.bias

    def why(self, text: str) -> list[tuple[str, float]]:
        """What spoke for (above 0) and against being spoken, most telling first, as shares of the logit."""
        found = standard(np.array([numbers(plain(text), self.lang, self.tables)]), self.mean, self.scale)[0]
        parts = zip(names(self.lang), (found * self.weights).tolist(), strict=True)
        return sorted(parts, key=lambda part: -abs(part[1]))


def standard(
    numbers_NF: NDArray[np.float64], mean: NDArray[np.float64], scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Numbers of texts on one scale, none farther than FARTHEST from the middle."""
    return np.clip((numbers_NF - mean) / scale, -FARTHEST, FARTHEST)


def spoken_score(text: str, lang: str | None = None) -> float:
    """How spoken a text is: 0 written, 1 spoken. Without `lang` the language is guessed from the script.

    Not a number where there is nothing to judge: no word, or a script that is neither Korean nor Latin.
    Raises: InputError for a `lang` that is neither ko nor en.
    """
    return score_texts([text], lang)[0]


def score_texts(texts: Iterable[str], lang: str | None = None) -> list[float]:
    """`spoken_score` of each text, in order. Costs about 0.1 ms a sentence."""
    return [score for _, score in score_with_language(texts, lang)]


def score_with_language(texts: Iterable[str], lang: str | None = None) -> list[tuple[Language | None, float]]:
    """Each text's language (`lang`, else guessed) and its score; None and not a number where it has none."""
    named = known_language(lang)
    found: list[tuple[Language | None, float]] = []
    for text in texts:
        of_text = named or language_of(text)
        score = scorer(of_text).score(text) if of_text else math.nan
        found.append((None, math.nan) if math.isnan(score) else (of_text, score))
    return found


def known_language(lang: str | None) -> Language | None:
    """`lang` as one that can be scored. Raises: InputError for one that cannot."""
    for known in LANGUAGES:
        if lang == known:
            return known
    if lang is None:
        return None
    says = f"{lang!r} is no language that is scored. Name {' or '.join(LANGUAGES)}, or none to have it guessed."
    raise InputError("spoken score", [Problem("lang", says)])


def sentences(text: str) -> list[str]:
    """The sentences of a text that hold a letter, cut at end marks and line ends."""
    return [part.strip() for part in _SENTENCE_END.split(text) if any(map(str.isalpha, part))]


@dataclass(frozen=True)
class Manner:
    """Some texts together: how many were scored and how many were not, the mean score, the share called spoken. Mean
    and share are not a number where none was scored.
    """

    n: int
    n_other: int
    mean: float
    share: float

    def as_json(self) -> dict[str, float | None]:
        """The same for JSON, which has no word for not a number."""
        mean, share = (None if math.isnan(value) else value for value in (self.mean, self.share))
        return {"n": self.n, "n_other": self.n_other, "mean": mean, "share": share}


def manner(scores: Sequence[float]) -> Manner:
    """Scores together; those that are not a number are counted apart."""
    told = [score for score in scores if not math.isnan(score)]
    n, n_other = len(told), len(scores) - len(told)
    if not told:
        return Manner(0, n_other, math.nan, math.nan)
    return Manner(n, n_other, math.fsum(told) / n, sum(score >= SPOKEN_FROM for score in told) / n)


def manner_by_language(scored: Iterable[tuple[Language | None, float]]) -> dict[str, Manner]:
    """`all`, and each language that is there, as `score_with_language` gives them."""
    scored = list(scored)
    found = {"all": manner([score for _, score in scored])}
    for lang in LANGUAGES:
        mine = [score for of_text, score in scored if of_text == lang]
        if mine:
            found[lang] = manner(mine)
    return found


@cache
def scorer(lang: Language) -> Scorer:
    """The classifier that ships, read once. Raises: BaseError where it is missing or damaged."""
    return load(shipped("spoken"))[lang]


def load(folder: Path) -> dict[Language, Scorer]:
    """The classifiers of a folder. Raises: BaseError where it is missing, damaged, or of another version."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        if facts["version"] != VERSION or any(list(facts[lang]["numbers"]) != names(lang) for lang in LANGUAGES):
            raise BaseError(f"{folder}: the spoken score there is of another version. Rebuild it: {REBUILD}")
        return {lang: _read(lang, facts[lang], tensors) for lang in LANGUAGES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as broken:
        says = f"{folder}: the spoken score cannot be read ({type(broken).__name__}: {broken})"
        raise BaseError(f"{says}. Rebuild it: {REBUILD}") from None


def _read(lang: Language, facts: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Scorer:
    listed = tensors[f"{lang}.grams"].tobytes().decode("utf-8").split("\n")
    counts, leanings = tensors[f"{lang}.dialogues"].tolist(), tensors[f"{lang}.leaning"].tolist()
    familiar = {gram: familiar_by(n) for gram, n in zip(listed, counts, strict=True) if n}
    leaning = {gram: value for gram, value in zip(listed, leanings, strict=True) if not math.isnan(value)}
    of_numbers = list(facts["numbers"].values())
    mean, scale, weights = (np.array([one[key] for one in of_numbers]) for key in ("mean", "scale", "weight"))
    return Scorer(lang, Tables(familiar, leaning), mean, scale, weights, float(facts["bias"]))


def familiar_by(n_dialogues: int) -> float:
    """How familiar an n-gram is that so many dialogues hold."""
    return math.log(n_dialogues + 0.5) if n_dialogues else UNSEEN


def _chance(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-logit)) if logit > -700 else 0.0
