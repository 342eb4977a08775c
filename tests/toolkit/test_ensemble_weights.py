"""Weights fitted on numbers small enough to search by hand, and on what members of a stack really say."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ensemble_world import LABELS, Bench
from toolkit.combine.merge import merge
from toolkit.combine.mix import Mixture
from toolkit.combine.rows import answering
from toolkit.combine.vote import vote_labels
from toolkit.ensemble.subjects import Table
from toolkit.ensemble.weights import (
    fit_label_weights,
    fit_mix_weights,
    fit_over_logarithms,
    fit_over_probabilities,
    fit_votes,
    search_merge_weights,
)
from toolkit.errors import DataError, SearchError
from toolkit.evaluate.classify import gold_labels
from toolkit.score import supervised_log_likelihoods
from toolkit.search.weights import LARGEST, Tried, search_weights
from toolkit.stack.stack import Stack

MANY = 10**9  # conversations: the pull towards equal weights is nothing
GRID = np.linspace(0.001, 0.999, 999)


def some_logp(n_members: int, n: int, n_words: int, seed: int = 0) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.log_softmax(2 * torch.randn(n_members, n, n_words, generator=noise), -1)


class TestNumbers:
    def test_an_average_of_probabilities_has_the_weights_of_a_search_by_hand(self) -> None:
        p_KN = some_logp(2, 300, 5)[:, :, 0].exp().double()
        p_KN[0] = p_KN[0] * 1.3
        fitted = fit_over_probabilities(["가", "나"], p_KN, MANY)
        losses = [float(-(w * p_KN[0] + (1 - w) * p_KN[1]).log().mean()) for w in GRID]
        assert fitted.weights["가"] == pytest.approx(GRID[int(np.argmin(losses))], abs=2e-3)
        assert fitted.loss == pytest.approx(min(losses), abs=1e-6) and fitted.loss < fitted.of_equal

    def test_an_average_of_logarithms_has_the_weights_of_a_search_by_hand(self) -> None:
        logp_KNV = some_logp(2, 400, 6)
        target_N = torch.multinomial((0.75 * logp_KNV[0] + 0.25 * logp_KNV[1]).softmax(-1), 1)[:, 0]
        fitted = fit_over_logarithms(["가", "나"], logp_KNV, target_N, MANY)
        losses = [
            float(torch.nn.functional.cross_entropy(w * logp_KNV[0] + (1 - w) * logp_KNV[1], target_N)) for w in GRID
        ]
        assert fitted.weights["가"] == pytest.approx(GRID[int(np.argmin(losses))], abs=5e-3)
        assert 0.6 < fitted.weights["가"] < 0.95
        assert fitted.loss == pytest.approx(min(losses), abs=1e-5)

    def test_whoever_is_right_gets_most_but_never_all(self) -> None:
        p_KN = torch.stack([torch.full((20,), 0.9), torch.full((20,), 0.1), torch.full((20,), 0.2)])
        weights = fit_over_probabilities(["가", "나", "다"], p_KN, 20).weights
        assert weights["가"] > 0.8 and min(weights.values()) > 0.01
        assert math.fsum(weights.values()) == pytest.approx(1.0)

    def test_few_conversations_stay_near_equal_weights(self) -> None:
        p_KN = torch.stack([torch.full((50,), 0.6), torch.full((50,), 0.3)])
        few, many = (fit_over_probabilities(["가", "나"], p_KN, n).weights["가"] for n in (2, 500))
        assert 0.5 < few < 0.7 < many

    def test_members_alike_stay_alike(self) -> None:
        logp_KNV = some_logp(1, 30, 4).repeat(3, 1, 1)
        target_N = torch.zeros(30, dtype=torch.long)
        for fitted in (
            fit_over_logarithms("abc", logp_KNV, target_N, 30),
            fit_over_probabilities("abc", logp_KNV[..., 0].exp(), 30),
        ):
            assert list(fitted.weights.values()) == pytest.approx([1 / 3] * 3, abs=1e-5)

    @pytest.mark.parametrize("how", ["hard", "soft", "logprob"])
    def test_a_vote_listens_to_the_member_that_knows(self, how: str) -> None:
        gold = torch.arange(60) % 3
        knows = 3.0 * torch.nn.functional.one_hot(gold, 3) + some_logp(1, 60, 3)[0]
        logp_KRL = torch.stack([some_logp(1, 60, 3, seed=5)[0], knows, some_logp(1, 60, 3, seed=6)[0]])
        fitted = fit_votes(["가", "나", "다"], logp_KRL, gold.tolist(), how)
        assert fitted.weights["나"] > max(fitted.weights["가"], fitted.weights["다"]) and fitted.n_fitted == 60
        right = [
            float((vote_labels(logp_KRL, how, weights).choice_R == gold).double().mean())  # type: ignore[arg-type]
            for weights in (None, list(fitted.weights.values()))
        ]
        assert right[1] > right[0] and fitted.loss < fitted.of_equal

    def test_a_label_that_a_member_excludes_harms_nobody(self) -> None:
        logp_KRL = some_logp(2, 10, 3)
        logp_KRL[0, :, 2] = -math.inf
        fitted = fit_votes(["가", "나"], logp_KRL, [2] * 10, "logprob")
        assert fitted.weights["나"] > 0.5 and math.isfinite(fitted.loss)


# On a stack


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Three members, each of which has learned a third of the talk."""
    bench = Bench(tmp_path_factory.mktemp("bench"), is_labelled=True)
    tasks = []
    for place, name in enumerate(("하나", "둘", "셋")):
        task = bench.task(name, max_steps=(12, 8, 1)[place], learning_rate=0.02)
        tasks.append(type(task)(name, task.recipe, task.rows[place::3], ()))
    bench.fit(tasks)
    return bench


@pytest.fixture
def table(bench: Bench) -> Table:
    stack = Stack(bench.base.model, base_hash=bench.base.hash)
    for name in bench.run.adapters():
        stack.add(name, bench.run.adapter(name))
    rows = list(bench.renderer.training_all(bench.held))
    return Table(bench.base, bench.renderer, stack, bench.held, rows, LABELS)


def loss_of(table: Table, weights: Mapping[str, float], over: Any) -> float:
    rows = [(row.input_ids, row.labels) for row in table.rows]
    with answering(table.stack, list(weights), Mixture, weights=tuple(weights.values()), over=over) as model:
        values = [value for row in supervised_log_likelihoods(model, rows) for value in row]
    return -sum(values) / len(values)


@pytest.mark.parametrize("over", ["prob", "logprob"])
def test_a_mixture_with_the_fitted_weights_has_the_loss_that_is_told(table: Table, over: str) -> None:
    names = ("하나", "둘", "셋")
    weights, report = fit_mix_weights(table, names, over)
    assert tuple(weights) == names
    assert report["loss"] == pytest.approx(loss_of(table, weights, over), abs=1e-5)
    assert report["of_equal"] == pytest.approx(loss_of(table, dict.fromkeys(names, 1 / 3), over), abs=1e-5)
    alone = [loss_of(table, {name: 1.0}, over) for name in names]
    assert report["of_best"] == pytest.approx(min(alone), abs=1e-5)
    assert report["loss"] < report["of_equal"] and report["n_fitted"] == sum(row.n_supervised for row in table.rows)


def test_distributions_are_kept_of_as_many_tokens_as_memory_holds(table: Table, monkeypatch: Any) -> None:
    n_words = table.base.model.config.vocab_size
    monkeypatch.setattr("toolkit.ensemble.weights.LOGITS", 2 * n_words * len(table.rows))
    _, report = fit_mix_weights(table, ("하나", "둘"), "logprob")
    assert report["n_fitted"] == len(table.rows) < sum(row.n_supervised for row in table.rows)


@pytest.mark.parametrize("how", ["hard", "soft", "logprob"])
def test_weights_of_a_vote_over_labels(table: Table, how: str) -> None:
    weights, report = fit_label_weights(table, ("하나", "셋"), gold_labels(table.talks), how)
    assert math.fsum(weights.values()) == pytest.approx(1.0) and report["n_rows"] == len(table.talks)
    assert report["loss"] <= report["of_equal"] + 1e-9


def test_a_label_that_the_members_did_not_learn_is_told(table: Table) -> None:
    gold = [*gold_labels(table.talks)[:-1], "처음"]
    with pytest.raises(DataError, match="처음: not among the labels learned"):
        fit_label_weights(table, ("하나", "셋"), gold, "soft")


def test_weights_of_a_merge_begin_with_equal_ones_and_leave_the_stack_as_it_was(table: Table) -> None:
    names = ("하나", "둘", "셋")
    adapters = {name: table.stack.adapter(name) for name in names}
    said: list[str] = []
    found = [
        search_merge_weights(lambda weights: merge(adapters, weights), table, names, 7, 3, said.append)
        for _ in range(2)
    ]
    (weights, history), again = found[0], found[1]
    assert history[0]["weights"] == pytest.approx(dict.fromkeys(names, 1 / 3))
    losses = [trial["loss"] for trial in history]
    assert len(losses) == 7 and weights == history[losses.index(min(losses))]["weights"]
    assert again == found[0]
    assert set(table.stack.slots) == set(names) and said[0].startswith("merge 1/7")
    table.stack.add("merge", merge(adapters, weights).adapter)
    assert loss_of(table, {"merge": 1.0}, "prob") == pytest.approx(min(losses), abs=1e-6)


def test_without_held_out_talk_there_is_nothing_to_fit_on(table: Table) -> None:
    empty = Table(table.base, table.renderer, table.stack, [], [], LABELS)
    for fit in (
        lambda: fit_mix_weights(empty, ("하나", "둘"), "prob"),
        lambda: fit_label_weights(empty, ("하나", "둘"), [], "soft"),
        lambda: search_merge_weights(lambda weights: merge({}, weights), empty, ("하나",), 2, 0, print),
    ):
        with pytest.raises(DataError, match=r"data\.valid"):
            fit()


# Optuna's part


def bowl(weights: Mapping[str, float]) -> float:
    return (weights["가"] - 0.9) ** 2 + (weights["나"] - 0.2) ** 2 + 1.0


def test_a_search_finds_what_is_best_and_tells_every_trial() -> None:
    heard: list[Tried] = []
    found = search_weights(["가", "나"], bowl, trials=20, seed=0, tell=lambda number, tried: heard.append(tried))
    assert found.loss < 1.01 < bowl({"가": 0.5, "나": 0.5}) == pytest.approx(found.of_equal)
    assert tuple(heard) == found.history and len(heard) == 20
    assert all(0 < weight <= LARGEST for tried in heard for weight in tried.weights.values())


def test_the_same_seed_tries_the_same_and_another_does_not() -> None:
    one, two, other = (search_weights(["가", "나"], bowl, trials=8, seed=seed).history for seed in (1, 1, 2))
    assert one == two != other and one[0] == other[0]


def test_a_merge_without_a_number_is_left_out() -> None:
    def loss(weights: Mapping[str, float]) -> float:
        return math.nan if weights["가"] > 0.6 else bowl(weights)

    found = search_weights(["가", "나"], loss, trials=12, seed=0)
    assert math.isfinite(found.loss) and any(tried.loss is None for tried in found.history)
    with pytest.raises(SearchError, match="None of 3"):
        search_weights(["가"], lambda weights: math.inf, trials=3, seed=0)
