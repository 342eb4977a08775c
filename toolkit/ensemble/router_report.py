"""How good a router is, and the calibration that makes its chances say so."""

# C texts, E experts, M scores a text, N texts that count, A manners.

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.combine.route import STRANGE, Router, chances_of
from toolkit.combine.route_style import N_MANNERS, manners
from toolkit.corpus.talk import Talk
from toolkit.ensemble.router_rows import Rows, rows_of
from toolkit.evaluate.metrics import accuracy, confusion, expected_calibration_error

OTHER = "other"  # what fitting nobody is called in reports
TURNED_AWAY = (0.05, 0.02)  # of talk not learnt from, after one turn and several; one that has learnt it sends less
TEMPERATURES = torch.logspace(-3.0, 2.0, 101)
SLOPES = torch.logspace(-1.5, 2.0, 71)
FEWEST_OWN, FEWEST_STRANGE = 200, 50  # texts of a manner that is calibrated by itself
STRANGERS_COUNT = 0.25  # of all strangers in the choice of the slope, against all talk


def calibrate(scores_CM: Tensor, rows: Rows, n_experts: int) -> Tensor:
    """`Router.tensors["calibration"]` from scores that a router gave rows it has not learnt from, [A, 3].

    The temperature (Guo et al. 2017, arXiv 1706.04599) and the slope minimise the log-loss of who it is for; the shift
    sends TURNED_AWAY of the experts' own talk to nobody. Each manner (one turn or several, the script) has its own
    where it has enough texts: on all together a router looks less sure of long Korean talk than it is right, and more
    of a first English message.
    """
    owner, weight = torch.tensor(rows.owner), torch.tensor(rows.weight)
    is_own = (torch.tensor(rows.turns) > 0) & (owner < n_experts)
    is_strange = owner >= n_experts
    manner = manners(rows.texts)
    found = torch.zeros(N_MANNERS, 3)
    for number in range(N_MANNERS):
        own, strange = is_own & (manner == number), is_strange & (manner == number)
        if own.sum() < FEWEST_OWN or strange.sum() < FEWEST_STRANGE:
            own, strange = is_own, is_strange
        found[number] = _fitted(scores_CM, owner, weight, own, strange, TURNED_AWAY[number % 2])
    return found


def _fitted(
    scores_CM: Tensor, owner: Tensor, weight: Tensor, is_own: Tensor, is_strange: Tensor, turned_away: float
) -> Tensor:
    """Temperature, slope and shift for some texts, [3]."""
    n_experts = scores_CM.shape[1] - STRANGE
    own_NM, of_own, own_weight = scores_CM[is_own], owner[is_own], weight[is_own]
    temperature = min(
        TEMPERATURES.tolist(), key=lambda t: _loss(torch.softmax(own_NM[:, :-STRANGE] / t, 1), of_own, own_weight)
    )
    best_N = torch.log_softmax(own_NM[:, :-STRANGE] / temperature, 1).amax(1)
    strange_N = torch.logsumexp(own_NM[:, -STRANGE:], 1)
    strangers_NM = scores_CM[is_strange]
    nobody = torch.full((len(strangers_NM),), n_experts)

    def with_slope(slope: float) -> Tensor:
        shift = -_quantile(slope * strange_N - best_N, own_weight, 1.0 - turned_away)
        return torch.tensor([temperature, slope, shift])

    def loss(slope: float) -> float:
        tried = with_slope(slope)
        lost = _loss(chances_of(strangers_NM, tried), nobody, weight[is_strange])
        return _loss(chances_of(own_NM, tried), of_own, own_weight) + STRANGERS_COUNT * lost

    return with_slope(min(SLOPES.tolist(), key=loss))


def _loss(chances: Tensor, owner: Tensor, weight: Tensor) -> float:
    told = chances.gather(1, owner[:, None])[:, 0].clamp_min(1e-9).log()
    return float(-(told * weight).sum() / weight.sum())


def _quantile(values: Tensor, weight: Tensor, share: float) -> float:
    order = values.argsort()
    reached = weight[order].cumsum(0) / weight.sum()
    return float(values[order][int((reached >= share).nonzero()[0])])


def judge(router: Router, model: Any, tokenizer: Any, talks: Mapping[str, Sequence[Talk]]) -> dict[str, Any]:
    """`report_of` over talk that the router has not learnt from, by expert. Raises: InputError as train_router does."""
    rows = rows_of({name: talks[name] for name in router.experts})
    numbers_CF = router.numbers(model, tokenizer, rows.texts)
    return report_of(router.of_texts(rows.texts, numbers_CF), rows, router.experts)


def report_of(chances: Tensor, rows: Rows, experts: Sequence[str]) -> dict[str, Any]:
    """JSON: for texts after one, three, and all numbers of user turns how many, accuracy (sent to nobody counts as
    wrong), calibration error, share of other, and the confusion matrix (a row for each expert, columns `labels`); and
    where there are strangers, the share of them that is sent to nobody.
    """
    labels = [*experts, OTHER]
    turns, owner = np.array(rows.turns), np.array(rows.owner)
    is_own = (turns > 0) & (owner < len(experts))
    parts = {"after 1": is_own & (turns == 1), "after 3": is_own & (turns == 3), "all": is_own}
    report: dict[str, Any] = {"labels": labels}
    for name, part in parts.items():
        if part.any():
            report[name] = _numbers(chances[torch.from_numpy(part)], [labels[i] for i in owner[part]], labels)
    strange = owner >= len(experts)
    if strange.any():
        said = chances[torch.from_numpy(strange)].argmax(1)
        report["strangers sent to other"] = round(float((said == len(experts)).float().mean()), 4)
    return report


def _numbers(chances: Tensor, gold: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    said = [labels[i] for i in chances.argmax(1).tolist()]
    told = [dict(zip(labels, row, strict=True)) for row in chances.tolist()]
    return {
        "n": len(gold),
        "accuracy": round(accuracy(gold, said), 4),
        "calibration_error": round(expected_calibration_error(gold, told), 4),
        "other": round(said.count(OTHER) / len(said), 4),
        "confusion": confusion(gold, said, labels)[:-1],
    }
