"""Weights of members, fitted on held-out talk: of a mixture, of a vote over labels, and of a merge.

Of mixtures and votes the held-out loss is convex in the weights, as averages of probabilities (the EM problem of
mixture weights, Jordan and Jacobs 1994) and as averages of their logarithms (a log-linear model, Hinton 2002). So one
descent finds the best ones. They are drawn towards equal ones by as much as one more conversation for each member
would, so that a handful of held-out rows cannot give everything to one of them, and nobody's weight becomes 0.
A merge has no such form: its weights are searched (toolkit/search/weights.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize  # type: ignore[import-untyped]
from torch import Tensor

from toolkit.combine.contract import Given
from toolkit.combine.merge import Merged
from toolkit.combine.rows import Apart, Together, answering
from toolkit.combine.vote import first_best
from toolkit.ensemble.subjects import Table
from toolkit.errors import DataError, Problem
from toolkit.evaluate.classify import label_places
from toolkit.fit.batches import Row
from toolkit.score import IGNORED, supervised_log_likelihoods
from toolkit.search.weights import Tried, search_weights
from toolkit.stack.stack import Stack

# K members, R rows, L labels, N tokens, V vocabulary, B rows of a batch, T tokens of a row.

Numbers = NDArray[np.float64]
Slope = Callable[[Numbers], tuple[float, Numbers]]  # weights to loss and gradient
PULL = 1.0  # conversations for each member that say: all alike
UNSURE = 0.1  # of a member's hard vote that is spread over all labels: nobody is wrong with certainty
LOGITS = 2**27  # numbers that are kept to fit a mixture over log-probabilities: half a gigabyte
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class FittedWeights:
    """Weights that sum to 1, in the order of the members.

    loss: held out, with them; of_equal: with equal ones; of_best: of the best member alone (nats for each label, or for
    each token). n_rows: conversations; n_fitted: labels or tokens that were fitted on.
    """

    weights: Mapping[str, float]
    loss: float
    of_equal: float
    of_best: float
    n_rows: int
    n_fitted: int

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


# From numbers alone


def fit_over_probabilities(names: Sequence[str], p_KN: Tensor, n_rows: int) -> FittedWeights:
    """Weights of an average of probabilities; p: what each member gives what really came, a label or a token.

    Cost: some dozen passes over the numbers.
    """
    p = p_KN.double().cpu().numpy()

    def slope(weights: Numbers) -> tuple[float, Numbers]:
        mixed = np.maximum(weights @ p, 1e-300)
        return float(-np.log(mixed).mean()), -(p / mixed).mean(axis=1)

    return _fitted(names, slope, n_rows, p.shape[1])


def fit_over_logarithms(names: Sequence[str], logp_KNV: Tensor, targets_N: Tensor, n_rows: int) -> FittedWeights:
    """Weights of an average of log-probabilities, renormalised. logp: log-probabilities of everything that may come."""
    gold_KN = logp_KNV.gather(2, targets_N.view(1, -1, 1).expand(len(logp_KNV), -1, 1))[..., 0].double()
    reach = max(1, 2**24 // logp_KNV.shape[2])

    def slope(weights: Numbers) -> tuple[float, Numbers]:
        w_K = torch.as_tensor(weights, dtype=logp_KNV.dtype, device=logp_KNV.device)
        level, expected_K = 0.0, torch.zeros(len(logp_KNV), dtype=torch.float64, device=logp_KNV.device)
        for piece_KNV in torch.split(logp_KNV, reach, dim=1):
            mixed_NV = torch.einsum("k,knv->nv", w_K, piece_KNV)
            level_N = mixed_NV.logsumexp(-1)
            level += float(level_N.double().sum())
            share_NV = (mixed_NV - level_N[:, None]).exp()
            expected_K += torch.einsum("nv,knv->k", share_NV, piece_KNV.clamp(min=-1e30)).double()
        n = len(targets_N)
        loss = (level - float((w_K.double() @ gold_KN).sum())) / n
        return loss, ((expected_K - gold_KN.sum(1)) / n).cpu().numpy()

    return _fitted(names, slope, n_rows, len(targets_N))


def fit_votes(names: Sequence[str], logp_KRL: Tensor, gold_R: Sequence[int], how: str) -> FittedWeights:
    """Weights of a vote over labels. logp: log-probabilities of labels; gold: the number of the right one of each row.

    soft and logprob: the loss of what the vote says. hard: the same of each member's choice, of which a tenth is spread
    over all labels, since the number of right answers has no slope.
    """
    logp_KRL = torch.log_softmax(logp_KRL.double(), -1)
    targets_R = torch.as_tensor(gold_R)
    if how == "logprob":
        return fit_over_logarithms(names, logp_KRL.clamp(min=-700.0), targets_R, len(targets_R))
    if how == "hard":
        chosen_KR = first_best(logp_KRL, 0.0)
        p_KR = (1 - UNSURE) * (chosen_KR == targets_R).double() + UNSURE / logp_KRL.shape[2]
    else:
        p_KR = logp_KRL.exp().gather(2, targets_R.view(1, -1, 1).expand(len(logp_KRL), -1, 1))[..., 0]
    return fit_over_probabilities(names, p_KR, len(targets_R))


def _fitted(names: Sequence[str], slope: Slope, n_rows: int, n_fitted: int) -> FittedWeights:
    """Weights as shares of exponentials, so that every point is allowed and the minimum, which the pull towards equal
    weights keeps away from 0, is the only one.
    """
    n_members = len(names)
    pull = PULL * n_members / max(1, n_rows)

    def shares(free: Numbers) -> Numbers:
        raised = np.exp(free - free.max())
        weights: Numbers = raised / raised.sum()
        return weights

    def objective(free: Numbers) -> tuple[float, Numbers]:
        weights = shares(free)
        loss, gradient = slope(weights)
        loss -= pull * float(np.log(np.maximum(weights, 1e-300)).mean())
        inner = weights * (gradient - weights @ gradient)
        return loss, inner + pull * (weights - 1.0 / n_members)

    found = minimize(objective, np.zeros(n_members), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    weights = shares(found.x)
    alone = [slope(np.eye(n_members)[place])[0] for place in range(n_members)]
    return FittedWeights(
        weights={name: float(weight) for name, weight in zip(names, weights, strict=True)},
        loss=slope(weights)[0],
        of_equal=slope(np.full(n_members, 1.0 / n_members))[0],
        of_best=min(alone),
        n_rows=n_rows,
        n_fitted=n_fitted,
    )


# From a table of what members say


def fit_label_weights(
    table: Table, names: Sequence[str], gold: Sequence[str], how: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """Weights of a vote of these members over the labels of the table's talks, and what is to be said of them.

    `gold`: the label of each talk. Raises: DataError without talk, and for a label that the members did not learn.
    """
    _refuse_none(len(table.talks))
    places = label_places(gold, table.labels)
    logp_KRL = torch.stack([label_logp(table.labelled(name), table.labels) for name in names])
    fitted = fit_votes(names, logp_KRL, places, how)
    return dict(fitted.weights), fitted.facts()


def fit_mix_weights(
    table: Table, names: Sequence[str], over: str, seed: int = 0
) -> tuple[dict[str, float], dict[str, Any]]:
    """Weights of a mixture of these members on the table's rows, and what is to be said of them. over: prob, logprob.

    Over log-probabilities the whole distributions are needed: they are kept for as many tokens as half a gigabyte
    holds, drawn evenly from all conversations. Raises: DataError without talk. Cost: a pass over the rows a member.
    """
    _refuse_none(len(table.rows))
    if over == "prob":
        p_KN = torch.tensor([[value for row in table.values(name) for value in row] for name in names]).double().exp()
        fitted = fit_over_probabilities(names, p_KN, len(table.rows))
    else:
        rows = [(row.input_ids, row.labels) for row in table.rows]
        logp_KNV, targets_N = distributions(table.stack, names, rows, seed)
        fitted = fit_over_logarithms(names, logp_KNV, targets_N, len(rows))
    return dict(fitted.weights), fitted.facts()


def label_logp(said: Sequence[Mapping[str, float]], labels: Sequence[str]) -> Tensor:
    """Log-probabilities [R, L] from what `classify_talks` says."""
    return torch.tensor([[math.log(max(of[label], 1e-300)) for label in labels] for of in said], dtype=torch.float64)


def distributions(stack: Stack, names: Sequence[str], rows: Sequence[Row], seed: int) -> tuple[Tensor, Tensor]:
    """What each member says may come, [K, N, V] in log-probabilities, and what came, [N], at supervised places.

    A draw of places, as many from each row as memory allows. Cost: a row for each member, in one pass.
    """
    noise = torch.Generator().manual_seed(seed)
    pieces: list[Tensor] = []
    targets: list[Tensor] = []
    with answering(stack, list(names), Together) as opened:
        most = max(1, LOGITS // (len(names) * opened.n_vocabulary * len(rows)))
        for batch in _batches(sorted(rows, key=lambda row: len(row[0])), BATCH_TOKENS // len(names)):
            width = len(batch[-1][0])
            ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in batch], device=opened.device)
            mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch]).to(opened.device)
            after = [[*labels[1:], *[IGNORED] * (width - len(labels) + 1)] for _, labels in batch]
            after_BT = torch.tensor(after)
            keep_BT = torch.stack([_some(of_T, most, noise) for of_T in after_BT])
            if keep_BT.any():
                logits_KNV = opened.each(ids_BT, mask_BT, None, keep_BT.to(opened.device))
                pieces.append(torch.log_softmax(logits_KNV.float(), -1).clamp(min=-1e4))
                targets.append(after_BT[keep_BT].to(opened.device))
    if not targets:
        _refuse_none(0)
    return torch.cat(pieces, dim=1), torch.cat(targets)


def _some(after_T: Tensor, most: int, noise: torch.Generator) -> Tensor:
    """Where a row's tokens are looked at: its supervised places, at most so many, drawn."""
    places = (after_T != IGNORED).nonzero()[:, 0]
    chosen = places[torch.randperm(len(places), generator=noise)[:most]]
    keep_T = torch.zeros(len(after_T), dtype=torch.bool)
    keep_T[chosen] = True
    return keep_T


def _batches(rows: Sequence[Row], n_tokens: int) -> list[list[Row]]:
    """Rows in order of length, as many together as a batch holds."""
    found: list[list[Row]] = []
    for row in rows:
        if not found or (len(found[-1]) + 1) * len(row[0]) > n_tokens:
            found.append([])
        found[-1].append(row)
    return found


# Of a merge


def search_merge_weights(
    merged: Callable[[Given], Merged],
    table: Table,
    names: Sequence[str],
    trials: int,
    seed: int,
    say: Callable[[str], None],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The weights of the merge with the lowest loss on the table's rows, and every trial: weights and loss, as JSON.

    merged: makes the merge of these members with such weights. The stack is left as it was.
    Raises: DataError without talk; SearchError; what the merge raises. Cost: a merge and a pass over the rows a trial.
    """
    _refuse_none(len(table.rows))
    rows = [(row.input_ids, row.labels) for row in table.rows]
    stack, tried_as = table.stack, _free_name(table.stack)

    def loss_of(weights: Mapping[str, float]) -> float:
        stack.add(tried_as, merged(dict(weights)).adapter)
        try:
            with answering(stack, [tried_as], Apart) as model:
                values = [value for row in supervised_log_likelihoods(model, rows) for value in row]
        finally:
            stack.remove(tried_as)
        return -sum(values) / len(values)

    def tell(number: int, tried: Tried) -> None:
        shown = ", ".join(f"{name} {weight:.2f}" for name, weight in tried.weights.items())
        loss = "no number" if tried.loss is None else f"{tried.loss:.4f}"
        say(f"merge {number + 1}/{trials}  held-out loss {loss}  {shown}")

    found = search_weights(names, loss_of, trials=trials, seed=seed, tell=tell)
    return dict(found.weights), [asdict(tried) for tried in found.history]


def _free_name(stack: Stack) -> str:
    name = "merge"
    while name in stack.slots:
        name += "-"
    return name


def _refuse_none(n_rows: int) -> None:
    if not n_rows:
        raise DataError("weights", [Problem("", "there is no held-out talk to fit them on. Set data.valid above 0.")])
