"""Learn the spoken score from the data that ships, and write it: `python -m toolkit.bases.spoken_train [--out FOLDER]`.

Spoken are the spoken sides of the pairs and all that is said in the dialogues; written are the written sides and the
topic lines, which are headlines. Pieces of pairs and pairs in a row stand beside whole ones, and at every length both
sides weigh nearly alike, so that length tells little. The same data and seed give the same bytes.
"""

import argparse
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from toolkit import disk
from toolkit.bases.spoken import FACTS, VERSION, WEIGHTS, Scorer, familiar_by, standard
from toolkit.bases.spoken_features import LANGUAGES, Language, Tables, grams, leaning, names, numbers, plain, sides
from toolkit.errors import DataError, Problem
from toolkit.shipped import shipped

VOICES = ("casual", "polite", "teacher", "listener")
FOLDS = 5
FEWEST_DIALOGUES = 4  # n-grams of fewer are not kept
FEWEST_TEXTS = 3  # that hold an n-gram, for it to have a leaning
SHARES = {"pair": 1.0, "piece": 0.3, "row": 0.3, "talk": 0.5, "topic": 0.5}  # weight of all rows of a kind together
PIECES, PIECE_WORDS, ROW_PAIRS = 3, (2, 8), (1, 3)  # a text's pieces; words in one; further texts in a row
LENGTH_BINS = (3.5, 7.5, 14.5)  # words
EVENNESS = 0.5  # 1: at every length both sides weigh exactly alike; 0: as they come
RIDGE = 10.0
WEIGHT = 350.0  # of each side in all
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """A plain text with its side. `group`: the pair or dialogue it came from, which folds keep together."""

    text: str
    is_spoken: bool
    kind: str
    group: int


@dataclass(frozen=True)
class Material:
    """What one language is learned from: (spoken, written) pairs, dialogues as (topic, texts), further labelled texts
    as (text, is_spoken).
    """

    lang: Language
    pairs: tuple[tuple[str, str], ...]
    dialogues: tuple[tuple[str, tuple[str, ...]], ...]
    more: tuple[tuple[str, bool], ...] = ()


def read_material(lang: Language) -> Material:
    """The data that ships. Raises: DataError where it is not there, or holds no pairs."""
    pairs = tuple((row["spoken"], row["written"]) for row in _read_rows(f"speech/register.{lang}.jsonl"))
    rows = [row for voice in VOICES for row in _read_rows(f"talk/{voice}.{lang}.jsonl")]
    talks = tuple((row["topic"], tuple(turn["content"] for turn in row["messages"])) for row in rows)
    return Material(lang, pairs, talks)


def _read_rows(name: str) -> list[dict[str, Any]]:
    path = shipped(name)
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as broken:
        raise DataError(
            str(path), [Problem("", f"cannot be read ({broken}). Restore it from the repository.")]
        ) from None
    if not rows:
        raise DataError(str(path), [Problem("", "holds no rows, so nothing spoken is learned. Restore it.")])
    return rows


def make_rows(material: Material, seed: int) -> list[Row]:
    """Every text to learn from: pairs, their pieces and rows of them, talk, topics, and what else is given."""
    draw = random.Random(seed)
    rows: list[Row] = []
    n = len(material.pairs)
    for is_spoken in (True, False):
        side = [plain(pair[0] if is_spoken else pair[1]) for pair in material.pairs]
        for number, text in enumerate(side):
            rows.append(Row(text, is_spoken, "pair", number))
            rows += [Row(piece, is_spoken, "piece", number) for piece in pieces(text, draw, PIECES, *PIECE_WORDS)]
            others = range(number % FOLDS, n, FOLDS)  # of the same fold
            chosen = draw.sample(others, min(len(others), draw.randint(*ROW_PAIRS)))
            rows.append(Row(plain(" ".join([text, *(side[other] for other in chosen)])), is_spoken, "row", number))
    for number, (topic, texts) in enumerate(material.dialogues):
        rows += [Row(plain(text), True, "talk", number) for text in texts]
        rows.append(Row(plain(topic), False, "topic", number))
    rows += [Row(plain(text), is_spoken, "pair", n + at) for at, (text, is_spoken) in enumerate(material.more)]
    return rows


def pieces(text: str, draw: random.Random, n: int, shortest: int, longest: int) -> Iterator[str]:
    """Up to n stretches of words of a plain text, none of them the whole."""
    words = text.split()
    for _ in range(n):
        length = draw.randint(shortest, longest)
        if len(words) > length:
            start = draw.randint(0, len(words) - length)
            yield f" {' '.join(words[start : start + length])} "


class Talked:
    """How many dialogues hold each n-gram. What comes from a dialogue is judged as if that one were not there, since
    new texts come from none.
    """

    def __init__(self, material: Material) -> None:
        self._lang = material.lang
        self._texts = [[plain(text) for text in texts] for _, texts in material.dialogues]
        self.counts: Counter[str] = Counter()
        for number in range(len(self._texts)):
            self.counts.update(self._held_by(number))
        self.familiar = {gram: familiar_by(n) for gram, n in self.counts.items() if n >= FEWEST_DIALOGUES}

    def familiar_to(self, row: Row, of_text: Sequence[str]) -> Mapping[str, float]:
        """The table by which a row is judged."""
        if row.kind not in ("talk", "topic"):
            return self.familiar
        held = set(of_text) if row.kind == "talk" else self._held_by(row.group)
        left = {gram: self.counts[gram] - (gram in held) for gram in of_text}
        return {gram: familiar_by(n) for gram, n in left.items() if n >= FEWEST_DIALOGUES}

    def _held_by(self, number: int) -> set[str]:
        return {gram for text in self._texts[number] for gram in grams(text, self._lang)}


def learn_leaning(rows: Sequence[Row], lang: Language) -> dict[str, float]:
    """For each n-gram of enough pairs the logarithm of how much oftener the spoken sides hold it than the written."""
    held: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for row in rows:
        if row.kind == "pair":
            held[row.is_spoken].update(set(grams(row.text, lang)))
    spoken, written = held[True], held[False]
    enough = (gram for gram in spoken | written if spoken[gram] + written[gram] >= FEWEST_TEXTS)
    return {gram: math.log((spoken[gram] + 1) / (written[gram] + 1)) for gram in enough}


def weigh(rows: Sequence[Row]) -> Floats:
    """What each row counts: kinds by SHARES, lengths evened out between the sides, both sides WEIGHT in all."""
    n_of = Counter((row.kind, row.is_spoken) for row in rows)
    weights = np.array([SHARES[row.kind] / n_of[row.kind, row.is_spoken] for row in rows])
    is_spoken = np.array([row.is_spoken for row in rows])
    bins = np.digitize([len(row.text.split()) for row in rows], LENGTH_BINS)
    for place in range(len(LENGTH_BINS) + 1):
        both = [(bins == place) & (is_spoken == side) for side in (True, False)]
        sums = [weights[mine].sum() for mine in both]
        if min(sums) > 0:
            for mine, of_side in zip(both, sums, strict=True):
                weights[mine] *= (sum(sums) / 2 / of_side) ** EVENNESS
    for side in (True, False):
        weights[is_spoken == side] *= WEIGHT / weights[is_spoken == side].sum()
    return weights


def _numbers(rows: Sequence[Row], lang: Language, talked: Talked) -> Floats:
    """The numbers of every row, the last one (leaning) left for later: it depends on what is learned from."""
    found = []
    for row in rows:
        of_text = list(grams(row.text, lang))
        found.append(numbers(row.text, lang, Tables(talked.familiar_to(row, of_text), {})))
    return np.array(found)


def fit_scorer(rows: Sequence[Row], of_rows_NF: Floats, talked: Talked, lang: Language) -> Scorer:
    """One classifier, not calibrated. Leanings of what is learned from come from the other folds' pairs."""
    leanings = learn_leaning(rows, lang)
    by_fold = [learn_leaning([row for row in rows if row.group % FOLDS != fold], lang) for fold in range(FOLDS)]
    of_rows_NF = of_rows_NF.copy()
    for number, row in enumerate(rows):
        is_outside = row.kind in ("talk", "topic")
        table = leanings if is_outside else by_fold[row.group % FOLDS]
        of_rows_NF[number, -1] = leaning(list(grams(row.text, lang)), table)
    weights_N = weigh(rows)
    mean = np.average(of_rows_NF, axis=0, weights=weights_N)
    scale = np.sqrt(np.average((of_rows_NF - mean) ** 2, axis=0, weights=weights_N)) + 1e-3
    is_spoken_N = np.array([row.is_spoken for row in rows], dtype=float)
    learned = fit_logistic(standard(of_rows_NF, mean, scale), is_spoken_N, weights_N, sides(lang))
    return Scorer(lang, Tables(talked.familiar, leanings), mean, scale, learned[:-1], float(learned[-1]))


def fit_logistic(x_NF: Floats, y_N: Floats, weights_N: Floats, side_F: Sequence[int], ridge: float = RIDGE) -> Floats:
    """Weights and, last, the bias of a logistic regression: an L2 penalty of ridge / 2 on weights alone, and no weight
    on the other side of its `side_F` (1: at least 0, -1: at most 0, 0: free).

    Projected Newton: a weight that its bound holds back is left out of the step.
    """
    x_NF = np.hstack([x_NF, np.ones((len(x_NF), 1))])
    penalty = np.array([ridge] * len(side_F) + [0.0])
    low = np.array([0.0 if side > 0 else -np.inf for side in side_F] + [-np.inf])
    high = np.array([0.0 if side < 0 else np.inf for side in side_F] + [np.inf])

    def cost(w_F: Floats) -> float:
        wrong_N = np.where(y_N > 0.5, -1, 1) * (x_NF @ w_F)
        return float(weights_N @ np.logaddexp(0, wrong_N) + penalty @ w_F**2 / 2)

    w_F = np.zeros(x_NF.shape[1])
    for _ in range(100):
        chance_N = 1 / (1 + np.exp(-np.clip(x_NF @ w_F, -500, 500)))
        gradient = x_NF.T @ (weights_N * (chance_N - y_N)) + penalty * w_F
        is_free = ~(((w_F <= low) & (gradient > 0)) | ((w_F >= high) & (gradient < 0)))
        if np.abs(gradient[is_free]).max(initial=0.0) < 1e-6:
            break
        curve = (x_NF * (weights_N * chance_N * (1 - chance_N))[:, None]).T @ x_NF + np.diag(penalty + 1e-9)
        step = np.zeros_like(w_F)
        step[is_free] = np.linalg.solve(curve[np.ix_(is_free, is_free)], gradient[is_free])
        length, now = 1.0, cost(w_F)
        while length > 1e-6 and cost(np.clip(w_F - length * step, low, high)) >= now:
            length /= 2
        w_F = np.clip(w_F - length * step, low, high)
    return w_F


@dataclass(frozen=True)
class Learned:
    """A calibrated classifier, and what it reached on data that it had not learned from."""

    scorer: Scorer
    counts: Mapping[str, int]  # dialogues that hold an n-gram
    measured: Mapping[str, float]


def learn(material: Material, seed: int = 0) -> Learned:
    """Learn from all of it; calibrate and measure by folds: pairs and dialogues held out whole. Costs some seconds."""
    lang = material.lang
    rows, talked = make_rows(material, seed), Talked(material)
    of_rows_NF = _numbers(rows, lang, talked)
    fold_N = np.array([row.group % FOLDS for row in rows])
    logit_N = np.zeros(len(rows))
    pieces_of: dict[str, list[tuple[bool, float]]] = {"2 words": [], "4 words": []}
    for fold in range(FOLDS):
        rest = np.flatnonzero(fold_N != fold)
        fitted = fit_scorer([rows[at] for at in rest], of_rows_NF[rest], talked, lang)
        draw = random.Random(seed + 1)
        for at in np.flatnonzero(fold_N == fold):
            of_text = list(grams(rows[at].text, lang))
            of_rows_NF[at, -1] = leaning(of_text, fitted.tables.leaning)
            logit_N[at] = fitted.logit(of_rows_NF[at : at + 1]).item()
            for n_words in (2, 4) if rows[at].kind == "pair" else ():
                for piece in pieces(rows[at].text, draw, 1, n_words, n_words):
                    of_piece = np.array([numbers(piece, lang, fitted.tables)])
                    pieces_of[f"{n_words} words"].append((rows[at].is_spoken, fitted.logit(of_piece).item()))
    slope, shift = calibrate(logit_N, np.array([row.is_spoken for row in rows], dtype=float), weigh(rows))
    whole = fit_scorer(rows, of_rows_NF, talked, lang)
    scorer = replace(whole, weights=slope * whole.weights, bias=slope * whole.bias + shift)
    measured = _measure(rows, slope * logit_N + shift) | {
        name: _balanced([(is_spoken, slope * logit + shift) for is_spoken, logit in found])
        for name, found in pieces_of.items()
    }
    return Learned(scorer, talked.counts, {name: round(value, 4) for name, value in measured.items()})


def calibrate(logit_N: Floats, y_N: Floats, weights_N: Floats) -> tuple[float, float]:
    """Slope and shift after which a logit is the odds of being spoken (Platt 1999), from texts not learned from."""
    learned = fit_logistic(logit_N[:, None], y_N, weights_N, [1], ridge=1e-6)
    return float(learned[0]), float(learned[1])


def _measure(rows: Sequence[Row], logit_N: Floats) -> dict[str, float]:
    of_kind: dict[str, list[tuple[bool, float]]] = {}
    for row, logit in zip(rows, logit_N.tolist(), strict=True):
        of_kind.setdefault(row.kind, []).append((row.is_spoken, logit))
    chance_N, y_N = 1 / (1 + np.exp(-logit_N)), np.array([row.is_spoken for row in rows], dtype=float)
    weights_N, bins = weigh(rows), np.minimum((chance_N * 10).astype(int), 9)
    gaps = [abs(float((weights_N * (y_N - chance_N))[bins == place].sum())) for place in range(10)]
    return {
        "pairs": _balanced(of_kind["pair"]),
        "talk": sum(logit >= 0 for _, logit in of_kind["talk"]) / len(of_kind["talk"]),
        "topics": sum(logit < 0 for _, logit in of_kind["topic"]) / len(of_kind["topic"]),
        "calibration error": sum(gaps) / float(weights_N.sum()),
    }


def _balanced(found: Sequence[tuple[bool, float]]) -> float:
    shares = []
    for side in (True, False):
        mine = [(logit >= 0) == side for is_spoken, logit in found if is_spoken == side]
        shares.append(sum(mine) / len(mine))
    return sum(shares) / 2


def write(learned: Sequence[Learned], folder: Path, seed: int) -> None:
    """Write the folder that `spoken.load` reads. Raises: DiskError."""
    facts: dict[str, Any] = {"version": VERSION, "seed": seed}
    tensors: dict[str, NDArray[Any]] = {}
    for one in learned:
        lang, tables = one.scorer.lang, one.scorer.tables
        kept = sorted(tables.familiar.keys() | tables.leaning.keys())
        tensors[f"{lang}.grams"] = np.frombuffer("\n".join(kept).encode("utf-8"), dtype=np.uint8)
        counts = [one.counts[gram] if gram in tables.familiar else 0 for gram in kept]
        tensors[f"{lang}.dialogues"] = np.array(counts, dtype=np.uint16)
        tensors[f"{lang}.leaning"] = np.array([tables.leaning.get(gram, math.nan) for gram in kept], dtype=np.float16)
        facts[lang] = {"measured": dict(one.measured), **_weights(one.scorer)}
    disk.make_folder(folder)
    disk.write_file(folder / WEIGHTS, lambda file: save_file(tensors, file))
    disk.write_json(folder / FACTS, facts)


def _weights(scorer: Scorer) -> dict[str, Any]:
    """Rounded, so that another machine's last digit does not show."""
    columns = (scorer.weights.tolist(), scorer.mean.tolist(), scorer.scale.tolist())
    of_names = {
        name: {"weight": round(weight, 4) + 0.0, "mean": round(mean, 5), "scale": round(scale, 5)}
        for name, weight, mean, scale in zip(names(scorer.lang), *columns, strict=True)
    }
    return {"bias": round(scorer.bias, 4), "numbers": of_names}


def main(argv: Sequence[str] | None = None) -> int:
    """Learn both languages, write them, and say what they reach on held-out folds."""
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.bases.spoken_train", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument(
        "--out", type=Path, default=shipped("spoken"), help="folder to write (default: the one that ships)"
    )
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    learned = [learn(read_material(lang), asked.seed) for lang in LANGUAGES]
    write(learned, asked.out, asked.seed)
    for one in learned:
        said = ", ".join(f"{name} {value:.3f}" for name, value in one.measured.items())
        sys.stdout.write(f"{one.scorer.lang}: {said}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
