"""Rounds in turn: weights of rows and of rounds by hand, and whole boosts on a tiny base."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ensemble_world import LABELS, Bench
from toolkit.bundle import Run
from toolkit.combine.mix import Mixture
from toolkit.combine.rows import answering
from toolkit.ensemble.boost import Boosted, Course, Rounds, boost, resampled, samme, stepwise
from toolkit.ensemble.experts import Task
from toolkit.ensemble.subjects import Table, vote
from toolkit.errors import DataError
from toolkit.evaluate import metrics
from toolkit.fit.fitted import Fitted
from toolkit.score import supervised_log_likelihoods
from toolkit.stack.stack import Stack


def says(*labels: int, n_labels: int = 3) -> torch.Tensor:
    """Log-probabilities of a round that is sure of these labels."""
    return torch.nn.functional.one_hot(torch.tensor(labels), n_labels).double().mul(5).log_softmax(-1)


class TestSamme:
    GOLD = torch.tensor([0, 1, 2, 0])

    def test_a_round_weighs_by_its_error_and_its_mistakes_grow(self) -> None:
        weights, votes, errors = samme([says(0, 1, 2, 1)], self.GOLD, np.ones(4))
        assert errors == [0.25]
        assert votes == pytest.approx([math.log(0.75 / 0.25) + math.log(2)])
        assert weights == pytest.approx([1 / 9, 1 / 9, 1 / 9, 6 / 9])

    def test_the_next_round_is_judged_by_the_grown_weights(self) -> None:
        _, votes, errors = samme([says(0, 1, 2, 1), says(1, 1, 2, 0)], self.GOLD, np.ones(4))
        assert errors[1] == pytest.approx(1 / 9) and votes[1] == pytest.approx(math.log(8) + math.log(2))

    def test_two_labels_are_adaboost(self) -> None:
        weights, votes, _ = samme([says(0, 0, 1, n_labels=2)], torch.tensor([0, 1, 1]), np.ones(3))
        assert votes == pytest.approx([math.log(2)]) and weights == pytest.approx([0.25, 0.5, 0.25])

    def test_one_no_better_than_guessing_ends_it(self) -> None:
        rounds = [says(0, 1, 2, 1), says(1, 2, 2, 1), says(0, 1, 2, 0)]
        weights, votes, errors = samme(rounds, self.GOLD, np.ones(4))
        assert len(votes) == 1 and errors == pytest.approx([1 / 4, 8 / 9])
        assert weights == pytest.approx([1 / 9, 1 / 9, 1 / 9, 6 / 9])

    def test_no_error_counts_as_half_of_one(self) -> None:
        weights, votes, errors = samme([says(0, 1, 2, 0)], self.GOLD, np.ones(4))
        assert errors == [0.125] and votes[0] == pytest.approx(math.log(7) + math.log(2))
        assert weights == pytest.approx([0.25] * 4)

    def test_rows_that_weigh_more_count_more(self) -> None:
        _, _, errors = samme([says(0, 1, 2, 1)], self.GOLD, np.array([1.0, 1.0, 1.0, 3.0]))
        assert errors == [0.5]


class TestText:
    def test_each_step_lowers_the_loss_most(self) -> None:
        noise = np.random.default_rng(0)
        first, second = noise.uniform(0.1, 0.9, (2, 200))
        weights = stepwise([first, second])
        grid = np.linspace(0, 1, 1001)
        best = grid[int(np.argmin([-np.log((1 - a) * first + a * second).mean() for a in grid]))]
        assert weights == pytest.approx([1 - best, best], abs=2e-3)

    def test_a_member_that_says_nothing_new_gets_nothing(self) -> None:
        better = np.full(50, 0.5)
        weights = stepwise([better, better / 2])
        assert weights[1] == pytest.approx(0.0, abs=1e-4) and sum(weights) == pytest.approx(1.0)

    def test_three_rounds_sum_to_one(self) -> None:
        weights = stepwise(list(np.random.default_rng(1).uniform(0.1, 0.9, (3, 100))))
        assert sum(weights) == pytest.approx(1.0) and len(weights) == 3


class TestDraws:
    def test_equal_weights_take_every_row_once(self) -> None:
        for seed in range(20):
            assert resampled(np.full(37, 1 / 37), 37, seed) == [1] * 37

    def test_each_stands_there_as_often_as_its_share_rounded(self) -> None:
        weights = np.array([0.5, 0.25, 0.15, 0.1])
        for seed in range(20):
            counts = resampled(weights, 30, seed)
            assert sum(counts) == 30
            assert all(abs(count - 30 * weight) < 1 for count, weight in zip(counts, weights, strict=True))

    def test_the_mean_of_many_draws_is_the_share(self) -> None:
        weights = np.array([0.62, 0.28, 0.1])
        means = np.mean([resampled(weights, 3, seed) for seed in range(2000)], axis=0)
        assert means == pytest.approx(3 * weights, abs=0.05)

    def test_the_same_seed_draws_the_same(self) -> None:
        weights = np.random.default_rng(0).uniform(size=100)
        assert resampled(weights, 100, 1) == resampled(weights, 100, 1) != resampled(weights, 100, 2)


# Whole boosts


class Boosting:
    """A bench whose task is boosted; `trained` counts the rounds that were trained by the last call."""

    def __init__(self, root: Path, *, is_labelled: bool, **train: Any) -> None:
        self.bench = Bench(root, n_rows=24, is_labelled=is_labelled)
        told = {"max_steps": 8, "learning_rate": 0.02, "batch_size": 8, **train}
        self.task = self.bench.task("first", **told)
        self.labels = LABELS if is_labelled else ()
        self.trained: list[Task] = []
        self.said: list[str] = []

    def table(self, talks: Any, stack: Stack) -> Table:
        rows = list(self.bench.renderer.training_all(talks))
        return Table(self.bench.base, self.bench.renderer, stack, talks, rows, self.labels)

    def __call__(self, run: Run | None = None, *, stop_at: int | None = None, **rounds: Any) -> Boosted | None:
        self.trained, place = [], run or self.bench.run

        def fit(task: Task) -> Mapping[str, Fitted] | None:
            if stop_at is not None and len(self.trained) >= stop_at:
                return None
            self.trained.append(task)
            return self.bench.fit([task], run=place)

        self.stack = Stack(self.bench.base.model, base_hash=self.bench.base.hash)
        self.watched = self.table(self.bench.held, self.stack)
        told = Rounds(**{"most": 3, "patience": 3, "seed": 0, **rounds})
        learned = self.table(self.bench.talks, self.stack)
        return boost(self.task, learned, self.watched, fit, place, told, self.said.append)


@pytest.mark.parametrize("is_labelled", [True, False])
def test_rounds_learn_what_was_hard_and_vote_with_their_weights(tmp_path: Path, is_labelled: bool) -> None:
    it = Boosting(tmp_path, is_labelled=is_labelled)
    boosted = it(seed=1)
    assert boosted is not None and 1 <= len(boosted.weights) <= 3
    assert it.trained[0].rows == it.task.rows
    assert it.trained[0].recipe == it.task.recipe
    assert [task.recipe.train.seed for task in it.trained] == list(range(len(it.trained)))
    assert len({len(task.rows) for task in it.trained}) == 1
    assert any(task.rows != it.task.rows for task in it.trained[1:])
    assert math.fsum(boosted.weights.values()) == pytest.approx(1.0)
    kept = list(boosted.weights)
    assert it.bench.run.adapters() == tuple(kept) and set(it.stack.slots) == set(kept) == set(boosted.fitted)
    loss = boosted.history[len(kept) - 1]["held-out loss"]
    if is_labelled:
        said = vote(it.watched, kept, boosted.how, boosted.weights)
        assert metrics.log_loss([str(talk.label) for talk in it.watched.talks], said) == pytest.approx(loss, abs=1e-6)
    else:
        rows = [(row.input_ids, row.labels) for row in it.watched.rows]
        values = tuple(boosted.weights.values())
        with answering(it.stack, kept, Mixture, weights=values, over="prob") as model:
            found = [value for row in supervised_log_likelihoods(model, rows) for value in row]
        assert -sum(found) / len(found) == pytest.approx(loss, abs=1e-5)
        best = min(-sum(sum(v) for v in of) / sum(map(len, of)) for of in (it.watched.values(name) for name in kept))
        assert loss <= best + 1e-6


def test_talk_weighs_by_its_perplexity_under_the_rounds_so_far(tmp_path: Path) -> None:
    it = Boosting(tmp_path, is_labelled=False)
    it(most=2)
    course = Course(it.task, it.table(it.bench.talks, it.stack), it.watched, it.bench.run, 0)
    first = course.kept(1)
    assert first is not None
    losses = np.array([-float(row.mean()) for row in torch.split(first["learned"], first["lengths"].tolist())])
    weights = course.standing([first]).row_weights_C
    assert losses.std() > 0.01
    assert weights == pytest.approx(np.exp(losses) / np.exp(losses).sum())


def test_garbled_talk_weighs_four_times_the_mean_at_most(tmp_path: Path) -> None:
    it = Boosting(tmp_path, is_labelled=False)
    it(most=1)
    course = Course(it.task, it.table(it.bench.talks, it.stack), it.watched, it.bench.run, 0)
    first = course.kept(1)
    assert first is not None
    first["learned"][: int(first["lengths"][0])] -= 30.0
    weights = course.standing([first]).row_weights_C
    perplexity = np.exp([-float(row.mean()) for row in torch.split(first["learned"], first["lengths"].tolist())])
    assert weights[0] / weights[1] == pytest.approx(4 * perplexity.mean() / perplexity[1])


@pytest.mark.parametrize("is_labelled", [True, False])
@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_boost_goes_on_round_by_round(tmp_path: Path, is_labelled: bool, stop_at: int) -> None:
    it = Boosting(tmp_path, is_labelled=is_labelled)
    whole = it(Run(tmp_path / "whole"))
    assert it(stop_at=stop_at) is None
    gone_on = it()
    assert whole is not None and gone_on is not None
    assert it.trained[0].name == f"round-{stop_at + 1}"
    assert replace(gone_on, fitted={}) == replace(whole, fitted={}) and gone_on.fitted.keys() == whole.fitted.keys()
    assert it.bench.hashes() == it.bench.hashes(Run(tmp_path / "whole"))
    assert it() is not None and it.trained == []


def test_a_round_whose_measure_is_damaged_is_asked_again(tmp_path: Path) -> None:
    it = Boosting(tmp_path, is_labelled=True)
    whole = it(most=2, patience=5)
    file = it.bench.run.checkpoints / "boost" / "round-1.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[: len(before) // 2])
    assert it(most=2, patience=5) == whole
    assert file.read_bytes() == before


def test_it_stops_when_rounds_do_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.ensemble.boost.HELPS", 1.0)  # nothing ever helps enough after the first
    it = Boosting(tmp_path, is_labelled=False)
    boosted = it(most=5, patience=2)
    assert boosted is not None and boosted.weights == {"round-1": 1.0} and len(boosted.history) == 3
    assert boosted.stopped == "2 rounds in a row did not help" and it.bench.run.adapters() == ("round-1",)


def test_rounds_no_better_than_guessing_leave_one_that_answers(tmp_path: Path) -> None:
    it = Boosting(tmp_path, is_labelled=True, learning_rate=1e-12, max_steps=1)
    boosted = it(most=5)
    assert boosted is not None and boosted.stopped == "no better than guessing"
    assert "round-1" in boosted.weights and math.fsum(boosted.weights.values()) == pytest.approx(1.0)


def test_a_first_round_no_better_than_guessing_is_told_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def guess(said: Any, gold_C: Any, start_C: Any) -> Any:
        return start_C / start_C.sum(), [], [0.7]

    monkeypatch.setattr("toolkit.ensemble.boost.samme", guess)
    it = Boosting(tmp_path, is_labelled=True, max_steps=1)
    boosted = it()
    assert boosted is not None and boosted.weights == {"round-1": 1.0} and it.bench.run.adapters() == ("round-1",)
    told = json.loads(json.dumps(boosted.facts(), allow_nan=False))
    assert told["stopped"] == "no better than guessing" and told["rounds"][0]["held-out loss"] is None
    assert len(it.trained) == 1 and "no better than guessing" in it.said[-1]


def test_a_held_out_label_that_nobody_learns_is_told_before_training(tmp_path: Path) -> None:
    it = Boosting(tmp_path, is_labelled=True)
    it.labels = LABELS[:-1]
    with pytest.raises(DataError, match=f"{LABELS[-1]}: not among the labels learned"):
        it()
    assert not it.trained


def test_without_held_out_talk_it_is_refused(tmp_path: Path) -> None:
    it = Boosting(tmp_path, is_labelled=True)
    it.bench.held = []
    with pytest.raises(DataError, match=r"data\.valid"):
        it()
