"""The numbers of an evaluation, from plain lists and strings. Knows nothing of models, files or tokens' meanings."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.evaluate.levels import LEVELS, Level, answer_level, levels

_UNIT = re.compile(r"\w+|[^\w\s]")
_LONG = 12  # characters: a longer "word" is a run without spaces, and counts character by character


def nfc(text: str) -> str:
    """The text with every Hangul syllable composed: the form in which lengths and bytes are counted."""
    return unicodedata.normalize("NFC", text)


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of a corpus, 0 to 100 (Popović 2015, as sacrebleu computes it): character n-grams up to 6, recall counts
    double.
    """
    if not answers or len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers and {len(references)} references: chrF needs one reference an answer")
    from sacrebleu.metrics import CHRF  # here: it takes half a second to import

    composed = [list(map(nfc, texts)) for texts in (answers, references)]
    return float(CHRF().corpus_score(composed[0], [composed[1]]).score)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of units over all n-grams, all texts together (Li et al. 2016); 0.0 where there is none."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition_4gram(texts: Sequence[str]) -> float:
    """The share of 4-grams of units that the same text has already said: 0.0 says nothing twice, near 1.0 runs in a
    circle.

    Counted over all texts together, so a long circle weighs as much as it is long. A unit is a word or a punctuation
    mark; in a run of more than 12 characters without a space every character is one, so that ㅋㅋㅋㅋ… is a circle too.
    """
    grams = [list(_grams(text, 4)) for text in texts]
    n_all = sum(map(len, grams))
    return 1.0 - sum(len(set(of_text)) for of_text in grams) / n_all if n_all else 0.0


def bits_per_byte(nll: float, n_bytes: int) -> float:
    """Negative log-likelihood in nats over UTF-8 bytes, in bits; not a number where there are no bytes."""
    return nll / n_bytes / math.log(2) if n_bytes else math.nan


def share_by_level(answers: Sequence[str]) -> dict[Level, float]:
    """Of the Korean sentences whose speech level can be told, the share of each level; all 0.0 where none can."""
    return _shares([level for answer in answers for level in levels(answer)])


def answers_by_level(answers: Sequence[str]) -> dict[Level, float]:
    """Of the answers with a sentence whose level can be told, the share that holds one level throughout.

    What is missing to 1.0 mixes levels; all 0.0 where no answer has such a sentence.
    """
    return _shares([answer_level(answer) for answer in answers])


def accuracy(gold: Sequence[str], said: Sequence[str]) -> float:
    """The share of labels that are right."""
    _check_pairs(gold, said)
    return sum(one == other for one, other in zip(gold, said, strict=True)) / len(gold)


def confusion(gold: Sequence[str], said: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """How often each label (row) was called what (column), in the order of `labels`."""
    _check_pairs(gold, said)
    counts = Counter(zip(gold, said, strict=True))
    return [[counts[row, column] for column in labels] for row in labels]


def macro_f1(gold: Sequence[str], said: Sequence[str], labels: Sequence[str]) -> float:
    """The mean over labels of F1, every label alike; a label that occurs neither in gold nor in what was said is left
    out.
    """
    table = np.array(confusion(gold, said, labels), dtype=float)
    right, both = table.diagonal(), table.sum(0) + table.sum(1)
    return float(np.mean(2 * right[both > 0] / both[both > 0])) if (both > 0).any() else 0.0


def log_loss(gold: Sequence[str], probabilities: Sequence[Mapping[str, float]]) -> float:
    """The mean of -ln p(gold label); p is taken as at least 1e-15."""
    _check_pairs(gold, probabilities)
    return float(np.mean([-math.log(max(of[label], 1e-15)) for label, of in zip(gold, probabilities, strict=True)]))


def expected_calibration_error(
    gold: Sequence[str], probabilities: Sequence[Mapping[str, float]], n_bins: int = 10
) -> float:
    """How far confidence is from accuracy: the mean gap over equal bins, weighted by size (Guo et al. 2017)."""
    _check_pairs(gold, probabilities)
    said = [max(of, key=of.__getitem__) for of in probabilities]
    confidence = np.array([of[label] for label, of in zip(said, probabilities, strict=True)])
    right = np.array([one == other for one, other in zip(gold, said, strict=True)], dtype=float)
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = [abs(float((right - confidence)[bins == place].sum())) for place in range(n_bins)]
    return sum(gaps) / len(gold)


@dataclass(frozen=True)
class Interval:
    """A value and the bounds between which 95 % of the resampled values lie."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    a_sums: Sequence[tuple[float, float]], b_sums: Sequence[tuple[float, float]], n: int = 1000, seed: int = 0
) -> Interval:
    """By which share b's mean is below a's (0.12: a fall of 12 %), with its interval over conversations.

    Each entry is a conversation's (sum, count), the same conversations in the same order for both; conversations are
    drawn with replacement, a's and b's together (paired bootstrap, Koehn 2004). Cost: n draws of len(a_sums).
    """
    if not a_sums or len(a_sums) != len(b_sums):
        raise ValueError(f"{len(a_sums)} and {len(b_sums)} conversations: a paired bootstrap needs the same ones")
    a_C2, b_C2 = np.asarray(a_sums, dtype=float), np.asarray(b_sums, dtype=float)
    draw = np.random.default_rng(seed)
    falls = []
    for _ in range(n):
        drawn = draw.integers(0, len(a_C2), len(a_C2))
        falls.append(_fall(a_C2[drawn], b_C2[drawn]))
    low, high = np.quantile(falls, [0.025, 0.975])
    return Interval(_fall(a_C2, b_C2), float(low), float(high))


def _fall(a_C2: np.ndarray, b_C2: np.ndarray) -> float:
    (a_sum, a_count), (b_sum, b_count) = a_C2.sum(0), b_C2.sum(0)
    return float(1.0 - (b_sum / b_count) / (a_sum / a_count))


def _grams(text: str, n: int) -> Sequence[tuple[str, ...]]:
    units: list[str] = []
    for unit in _UNIT.findall(nfc(text).lower()):
        units += list(unit) if len(unit) > _LONG else [unit]
    return list(zip(*(units[start:] for start in range(n)), strict=False))


def _shares(found: Sequence[str | None]) -> dict[Level, float]:
    told = [level for level in found if level is not None]
    return {level: told.count(level) / len(told) if told else 0.0 for level in LEVELS}


def _check_pairs(gold: Sequence[object], other: Sequence[object]) -> None:
    if not gold or len(gold) != len(other):
        raise ValueError(
            f"{len(gold)} labels against {len(other)}: an evaluation needs the same number, and at least one"
        )
