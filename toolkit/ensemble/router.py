"""Train a router: which expert a conversation is for, and whether it is for any; see toolkit/combine/route.py.

Everything is fitted on the experts' training talk and on text that is no expert's. Calibration and the report come from
chances that talk was given by a router that had not learnt from it (folds by conversation); the router handed back has
learnt from all. The same talk and seed give the same router.
"""

# C texts, E experts, S kinds of strangers, M = E + S, F dense numbers, G buckets, D = G + F + 3 features, A manners.

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from toolkit.bases.load import LoadedBase
from toolkit.combine.route import FAMILIAR, STRANGE, Kind, Router, chances_of, standard
from toolkit.combine.route_encoder import Encoder, open_encoder
from toolkit.combine.route_features import N_ALL, N_BUCKETS, Pieces, hidden, pieces
from toolkit.combine.route_style import manners
from toolkit.corpus.talk import Talk
from toolkit.ensemble.router_report import calibrate, report_of
from toolkit.ensemble.router_rows import Rows, add_strangers, rows_of, strangers
from toolkit.errors import InputError, Problem

FOLDS = 4
NUMBERS_SHARE = 0.3  # how much dense numbers count beside pieces
NUMBERS_OF_MEANS = 0.05  # the same where the nearest mean decides
SIGNS_COUNT = 2.0  # how much a sign of how a text is typed counts beside a piece
STRANGE_WEIGHT = 0.5  # of all strangers, against all talk
SOFTNESS = 5.0  # inverse of the ridge
Floats = NDArray[np.float64]
Part = Literal["experts", "strange"]


@dataclass(frozen=True)
class Design:
    """Features of all rows. numbers_CF: as they come. owner, talk, weight: of the rows."""

    found: Pieces
    numbers_CF: Tensor
    owner: NDArray[np.int64]
    talk: NDArray[np.int64]
    weight: Floats
    n_experts: int


def train_router(
    base: LoadedBase,
    talks: Mapping[str, Sequence[Talk]],
    *,
    kind: Kind = "classifier",
    seed: int = 0,
    encoder: str | None = None,
) -> tuple[Router, dict[str, Any]]:
    """A router over the experts named, in their order, and a report for run.json: accuracy, calibration error, share
    sent to nobody, and the confusion matrix after one, three and all numbers of user turns, and milliseconds a text.

    talks: each expert's training talk. encoder: of kind embedding, a folder or hub id.
    Cost: one pass of a quarter of the base over all user turns, some thousand short samples of the base, and five fits
    of logistic regression; about a minute for 1,700 conversations on two cores.
    Raises: InputError for one expert alone, an expert with too little talk, or an encoder missing or not asked for;
    BaseError where the encoder cannot be opened; DataError where the shipped strangers cannot be read.
    """
    rows = rows_of(talks)
    encode, named = _encoder(kind, encoder)
    for at, texts in enumerate(strangers(base.model, base.tokenizer, rows.texts, seed)):
        add_strangers(rows, texts, len(talks) + at, seed)
    if max(rows.owner) < len(talks):
        says = "no text is left that is no expert's. Leave the data/speech files out of the experts' data."
        raise InputError("router", [Problem("", says)])
    started = time.perf_counter()
    numbers_CF = encode(rows.texts) if encode else hidden(base.model, base.tokenizer, rows.texts)
    design = _design(rows, numbers_CF, len(talks))
    spent_ms = 1000 * (time.perf_counter() - started) / len(rows.texts)
    fold = folds(design, seed)
    scores_CM = torch.zeros(len(rows.texts), len(talks) + STRANGE)
    for number in range(int(fold.max()) + 1):
        fitted = fit(design, fold != number, kind)
        scores_CM[fold == number] = _scores(fitted, design, fold == number)
    calibration = calibrate(scores_CM, rows, len(talks))
    tensors = fit(design, np.ones(len(fold), dtype=bool), kind) | {"calibration": calibration}
    router = Router(
        kind, tuple(talks), numbers_CF.shape[1], "" if encode else base.hash, MappingProxyType(tensors), named, encode
    )
    report = report_of(chances_of(scores_CM, calibration[manners(rows.texts)]), rows, router.experts)
    return router, report | {"kind": kind, "seed": seed, "milliseconds": round(spent_ms, 3)}


def _encoder(kind: Kind, name: str | None) -> tuple[Encoder | None, tuple[str, str] | None]:
    if (kind == "embedding") != (name is not None):
        says = "is needed by router embedding: name a folder or hub id" if name is None else "is read by no such router"
        raise InputError("router", [Problem("combine.encoder", f"{says}. Name it with router: embedding, or neither.")])
    if name is None:
        return None, None
    encode, found = open_encoder(name)
    return encode, (name, found)


def _design(rows: Rows, numbers_CF: Tensor, n_experts: int) -> Design:
    owner, talk = np.array(rows.owner), np.array(rows.talk)
    return Design(pieces(rows.texts), numbers_CF, owner, talk, np.array(rows.weight), n_experts)


def folds(design: Design, seed: int) -> NDArray[np.int64]:
    """The fold of every row: talks of each expert dealt out evenly, a talk whole; strangers likewise."""
    draw = np.random.default_rng(seed)
    kinds = [np.unique(design.talk[design.owner == owner]) for owner in np.unique(design.owner)]
    n_folds = min(FOLDS, *map(len, kinds[: design.n_experts]))
    fold = np.zeros(len(design.owner), dtype=np.int64)
    for talks in kinds:
        for place, talk in enumerate(draw.permutation(talks)):
            fold[design.talk == talk] = place % n_folds
    return fold


def fit(design: Design, kept: NDArray[np.bool_], kind: Kind) -> dict[str, Tensor]:
    """The tensors of a router that learnt from the rows kept, without calibration."""
    is_own = design.talk >= 0
    rarity, known = _counted(design, kept)
    own = design.numbers_CF[torch.from_numpy(kept & is_own)]
    mean_F = own.mean(0)
    scale_F = 1.0 / ((own.std(0) + 1e-4) * own.shape[1] ** 0.5)
    tensors = {"rarity": rarity, "known": known, "mean": mean_F, "scale": scale_F}
    columns: list[Floats] = []
    biases: list[Floats] = []
    for part in ("experts", "strange"):
        use = kept & is_own if part == "experts" else kept
        solve, share = _regression, NUMBERS_SHARE
        if kind == "centroid" and part == "experts":
            solve, share = _means, NUMBERS_OF_MEANS
        scales = _block_scales(design, part, share)
        x_CD = _features(design, tensors, use) @ _diagonal(scales)
        groups = design.owner if part == "experts" else np.maximum(design.owner - design.n_experts + 1, 0)
        weight_D, bias = solve(x_CD, groups[use], _weights(design, use), part)
        columns.append(weight_D * scales[:, None])
        biases.append(bias)
    weights_DM = torch.from_numpy(np.concatenate(columns, axis=1)).float()
    ends = (N_ALL, N_ALL + len(mean_F))
    return tensors | {
        "pieces": weights_DM[: ends[0]].contiguous(),
        "numbers": weights_DM[ends[0] : ends[1]].contiguous(),
        "familiar": weights_DM[ends[1] :].contiguous(),
        "bias": torch.from_numpy(np.concatenate(biases)).float(),
    }


def _counted(design: Design, kept: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """How rare each bucket is among the rows kept, and how many of their talks hold each piece."""
    row, buckets = design.found.rows, design.found.buckets
    in_kept = kept[row]
    n_rows = np.bincount(buckets[in_kept], minlength=N_ALL)
    rarity = np.log((1 + kept.sum()) / (1 + n_rows)) + 1.0
    rarity[N_BUCKETS:] *= SIGNS_COUNT
    of_talk = design.talk[row]
    own = in_kept & (of_talk >= 0) & (buckets < N_BUCKETS)
    pairs = np.unique(of_talk[own] * N_BUCKETS + buckets[own])
    known = np.bincount(pairs % N_BUCKETS, minlength=N_BUCKETS)
    return torch.from_numpy(rarity).float(), torch.from_numpy(known).float()


def _features(design: Design, tensors: Mapping[str, Tensor], use: NDArray[np.bool_]) -> csr_matrix:
    """Everything a score is made of, [rows used, D]. A talk is judged as if the others alone were known."""
    values = design.found.weighed(tensors["rarity"]).numpy().astype(np.float64)
    ends = np.append(design.found.starts, len(values))
    counted = csr_matrix((values, design.found.buckets, ends), shape=(len(use), N_ALL))[use]
    numbers = standard(design.numbers_CF, tensors["mean"], tensors["scale"]).numpy()[use]
    own = torch.from_numpy((design.talk >= 0).astype(np.float32))
    familiar = design.found.familiarity(tensors["known"], own).numpy()[use]
    return hstack([counted, csr_matrix(numbers), csr_matrix(familiar)]).tocsr()


def _block_scales(design: Design, part: Part, share: float) -> Floats:
    """What pieces and signs, dense numbers and familiarity are multiplied by; the last tells strangers alone."""
    width, known = design.numbers_CF.shape[1], 0.0 if part == "experts" else 1.0
    return np.concatenate([np.ones(N_ALL), np.full(width, share), np.full(FAMILIAR, known)])


def _diagonal(scales: Floats) -> csr_matrix:
    places = np.arange(len(scales))
    return csr_matrix((scales, (places, places)))


def _weights(design: Design, use: NDArray[np.bool_]) -> Floats:
    """What the rows used count: all strangers together STRANGE_WEIGHT of all talk, every kind alike."""
    weight = design.weight.copy()
    strange = use & (design.talk < 0)
    kinds = np.unique(design.owner[strange])
    total = weight[use & ~strange].sum()
    for kind in kinds:
        mine = strange & (design.owner == kind)
        weight[mine] *= STRANGE_WEIGHT * total / len(kinds) / weight[mine].sum()
    found: Floats = weight[use]
    return found


def _regression(x_CD: csr_matrix, group: NDArray[np.int64], weight: Floats, part: Part) -> tuple[Floats, Floats]:
    """Columns of a multinomial logistic regression; of strangers against group 0, which is all talk."""
    model = LogisticRegression(C=SOFTNESS, max_iter=200, tol=1e-3).fit(x_CD, group, sample_weight=weight)
    columns, bias = model.coef_.T, model.intercept_
    if columns.shape[1] == 1:  # of two groups sklearn keeps the second's score alone
        columns, bias = np.hstack([np.zeros_like(columns), columns]), np.array([0.0, bias[0]])
    return _told(columns, bias, part, model.classes_)


def _means(x_CD: csr_matrix, group: NDArray[np.int64], weight: Floats, part: Part) -> tuple[Floats, Floats]:
    """Columns whose largest score is the nearest mean's: -|x - m|²/2 without what is the same for all."""
    groups = np.unique(group)
    columns = np.stack(
        [np.asarray(x_CD[group == g].T @ weight[group == g]).ravel() / weight[group == g].sum() for g in groups], axis=1
    )
    return _told(columns, -0.5 * (columns**2).sum(0), part, groups)


def _told(columns: Floats, bias: Floats, part: Part, groups: NDArray[np.int64]) -> tuple[Floats, Floats]:
    if part == "experts":
        return columns, bias
    against, at = columns[:, 1:] - columns[:, :1], bias[1:] - bias[0]
    if len(groups) == 1 + STRANGE:
        return against, at
    whole, off = np.zeros((len(columns), STRANGE)), np.full(STRANGE, -1e4)  # a kind of which there is no text
    for place, kind in enumerate(groups[1:]):
        whole[:, kind - 1], off[kind - 1] = against[:, place], at[place]
    return whole, off


def _scores(tensors: Mapping[str, Tensor], design: Design, use: NDArray[np.bool_]) -> Tensor:
    """Scores of the rows used, which `tensors` has not learnt from, [rows used, M]."""
    kept = replace(design, talk=np.full_like(design.talk, -1))
    weights = torch.cat([tensors["pieces"], tensors["numbers"], tensors["familiar"]]).double().numpy()
    found = _features(kept, tensors, use) @ weights
    return torch.from_numpy(found).float() + tensors["bias"]
