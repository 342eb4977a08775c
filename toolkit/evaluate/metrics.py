"""The numbers of an evaluation, from plain lists and strings. Knows nothing of models, files or tokens' meanings."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from toolkit.evaluate.levels import LEVELS, Level, answer_level, levels

_UNIT = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w+")
_SIGN = re.compile(r"[^\W_]")
_HANGUL = re.compile("[가-힣]")
N_BINS = 10
_LONG = 12  # characters: a longer "word" is a run without spaces, and counts character by character


def nfc(text: str) -> str:
    """The text with every Hangul syllable composed: the form in which lengths and bytes are counted."""
    return unicodedata.normalize("NFC", text)


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of a corpus, 0 to 100 (Popović 2015, as sacrebleu computes it): character n-grams up to 6, recall counts
    double.
    """
    _check_answers(answers, references)
    from sacrebleu.metrics import CHRF  # here: it takes half a second to import

    composed = [list(map(nfc, texts)) for texts in (answers, references)]
    return float(CHRF().corpus_score(composed[0], [composed[1]]).score)


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of a corpus, 0 to 100 (Papineni et al. 2002, as sacrebleu computes it; exponential smoothing).

    Units are sacrebleu's 13a tokens, and single characters where the reference holds Hangul: Korean particles and
    endings are written into the word, so that whole words hardly ever agree.
    """
    _check_answers(answers, references)
    from sacrebleu.metrics import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_char import TokenizerChar

    words, signs = Tokenizer13a(), TokenizerChar()
    said, wanted = [], []
    for answer, reference in zip(map(nfc, answers), map(nfc, references), strict=True):
        cut = signs if _HANGUL.search(reference) else words
        said.append(cut(answer))
        wanted.append(cut(reference))
    return float(BLEU(tokenize="none", force=True).corpus_score(said, [wanted]).score)


@dataclass(frozen=True)
class Rouge:
    """ROUGE (Lin 2004), F1 in per cent, the mean over answers: single units, pairs of units, and the longest common
    subsequence of units.
    """

    rouge_1: float
    rouge_2: float
    rouge_l: float


def rouge(answers: Sequence[str], references: Sequence[str]) -> Rouge:
    """ROUGE-1, 2 and L of answers. Units are words in lower case, without stemming; single characters, spaces left
    out, where the reference holds Hangul (see `bleu`).

    Cost: the length of an answer times that of its reference, 64 steps at once.
    """
    _check_answers(answers, references)
    found = []
    for answer, reference in zip(map(nfc, answers), map(nfc, references), strict=True):
        pattern = _SIGN if _HANGUL.search(reference) else _WORD
        a, b = pattern.findall(answer.lower()), pattern.findall(reference.lower())
        of_pairs = [Counter(pairwise(one)) for one in (a, b)]
        common = (
            (Counter(a) & Counter(b)).total(),
            (of_pairs[0] & of_pairs[1]).total(),
            _longest_common(a, b),
        )
        lengths = ((len(a), len(b)), (of_pairs[0].total(), of_pairs[1].total()), (len(a), len(b)))
        found.append([200 * n / sum(of) if sum(of) else 0.0 for n, of in zip(common, lengths, strict=True)])
    return Rouge(*(float(mean) for mean in np.mean(found, axis=0)))


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence; a column of the table is the bits of one number (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, unit in enumerate(a):
        places[unit] = places.get(unit, 0) | 1 << place
    column = whole = (1 << len(a)) - 1
    for unit in b:
        hit = column & places.get(unit, 0)
        column = (column + hit | column - hit) & whole
    return (column ^ whole).bit_count()


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


def expected_calibration_error(gold: Sequence[str], probabilities: Sequence[Mapping[str, float]]) -> float:
    """How far confidence is from accuracy: the mean gap over N_BINS equal bins, weighted by size (Guo et al. 2017)."""
    _check_pairs(gold, probabilities)
    said = [max(of, key=of.__getitem__) for of in probabilities]
    confidence = np.array([of[label] for label, of in zip(said, probabilities, strict=True)])
    right = np.array([one == other for one, other in zip(gold, said, strict=True)], dtype=float)
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    gaps = [abs(float((right - confidence)[bins == place].sum())) for place in range(N_BINS)]
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
    return _bootstrap(a_sums, b_sums, _share, n, seed)


def bootstrap_difference(
    a_sums: Sequence[tuple[float, float]], b_sums: Sequence[tuple[float, float]], n: int = 1000, seed: int = 0
) -> Interval:
    """By how much b's mean is below a's, with its interval: `bootstrap_interval` for what may be 0, as error rates."""
    return _bootstrap(a_sums, b_sums, _fall, n, seed)


def _bootstrap(
    a_sums: Sequence[tuple[float, float]],
    b_sums: Sequence[tuple[float, float]],
    of: Callable[[float, float], float],
    n: int,
    seed: int,
) -> Interval:
    if not a_sums or len(a_sums) != len(b_sums):
        raise ValueError(f"{len(a_sums)} and {len(b_sums)} conversations: a paired bootstrap needs the same ones")
    a_C2, b_C2 = np.asarray(a_sums, dtype=float), np.asarray(b_sums, dtype=float)
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        drawn = draw.integers(0, len(a_C2), len(a_C2))
        found.append(of(_mean(a_C2[drawn]), _mean(b_C2[drawn])))
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(of(_mean(a_C2), _mean(b_C2)), float(low), float(high))


def _mean(sums_C2: np.ndarray) -> float:
    value, count = sums_C2.sum(0)
    return float(value / count)


def _share(a: float, b: float) -> float:
    return 1.0 - b / a if a else math.copysign(math.inf, -b) if b else 0.0


def _fall(a: float, b: float) -> float:
    return a - b


def _grams(text: str, n: int) -> Sequence[tuple[str, ...]]:
    units: list[str] = []
    for unit in _UNIT.findall(nfc(text).lower()):
        units += list(unit) if len(unit) > _LONG else [unit]
    return list(zip(*(units[start:] for start in range(n)), strict=False))


def _shares(found: Sequence[str | None]) -> dict[Level, float]:
    told = [level for level in found if level is not None]
    return {level: told.count(level) / len(told) if told else 0.0 for level in LEVELS}


def _check_answers(answers: Sequence[str], references: Sequence[str]) -> None:
    if not answers or len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers and {len(references)} references: each answer needs one reference")


def _check_pairs(gold: Sequence[object], other: Sequence[object]) -> None:
    if not gold or len(gold) != len(other):
        raise ValueError(
            f"{len(gold)} labels against {len(other)}: an evaluation needs the same number, and at least one"
        )
