"""Samples of a bag, what its members learn, and what they say of talk that they did not see."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ensemble_world import LABELS, Bench, recipe_on
from toolkit.combine.rows import Apart, answering
from toolkit.ensemble.bag import Bag, bootstrap, conversations, out_of_bag
from toolkit.ensemble.subjects import Table
from toolkit.evaluate.classify import classify_talks
from toolkit.fit.batches import Row
from toolkit.score import supervised_log_likelihoods
from toolkit.stack.stack import Stack

ROWS: list[Row] = [([1, n, 3], [-100, n, 3]) for n in range(50)]


class TestSamples:
    def test_a_sample_is_drawn_with_repetition_and_the_same_every_time(self) -> None:
        drawn = bootstrap(3, 1000, 2)
        assert drawn == bootstrap(3, 1000, 2) == sorted(drawn) and len(drawn) == 1000
        assert 0.60 < len(set(drawn)) / 1000 < 0.66 and 0 <= drawn[0] and drawn[-1] < 1000

    def test_members_and_seeds_draw_apart(self) -> None:
        samples = [bootstrap(seed, 100, member) for seed in (0, 1) for member in (0, 1)]
        assert len(set(map(tuple, samples))) == 4

    def test_rows_of_one_conversation_are_drawn_together(self) -> None:
        rows = [*ROWS, *ROWS[:10], ROWS[3]]
        copies = conversations(rows)
        assert copies[3] == [3, 53, 60] and copies[20] == [20] and len(copies) == 50
        bag = Bag.of(rows, 4, seed=0)
        for name in bag.names:
            learned = [row[0][1] for row in bag.rows_of(name)]
            drawn = bag.drawn[name]
            assert learned.count(3) == 3 * list(drawn).count(3) and learned.count(20) == list(drawn).count(20)

    def test_without_a_sample_everybody_learns_everything_in_its_order(self) -> None:
        rows = [*ROWS, ROWS[3]]
        bag = Bag.of(rows, 2, seed=5, is_bootstrap=False)
        assert bag.rows_of("member-2") == rows and set(bag.unseen()) == {()}

    def test_unseen_are_those_that_are_not_drawn(self) -> None:
        bag = Bag.of(ROWS, 6, seed=1)
        for place, names in enumerate(bag.unseen()):
            assert names == tuple(name for name in bag.names if place not in bag.drawn[name])
        assert 0.3 < sum(map(len, bag.unseen())) / (6 * 50) < 0.45

    def test_what_is_told_draws_the_samples_again(self) -> None:
        bag = Bag.of(ROWS, 3, seed=9)
        facts = bag.facts()
        assert facts["members"]["member-3"]["seed"] == 11
        for number, name in enumerate(bag.names):
            again = bootstrap(facts["seed"], facts["conversations"], number)
            assert again == bag.drawn[name] and facts["members"][name]["different"] == len(set(again))

    def test_seeds_count_on_and_come_round(self) -> None:
        assert [Bag.of(ROWS, 2, seed=2**32 - 1).seed_of(name) for name in ("member-1", "member-2")] == [2**32 - 1, 0]


def bagged(bench: Bench, n_members: int, *, is_bootstrap: bool = True) -> Bag:
    bag = Bag.of(bench.rows, n_members, seed=4, is_bootstrap=is_bootstrap)
    bench.fit(bag.tasks(recipe_on(bench.base, seed=4, max_steps=10, learning_rate=0.02), ()))
    return bag


def table_of(bench: Bench, labels: Sequence[str]) -> Table:
    stack = Stack(bench.base.model, base_hash=bench.base.hash)
    for name in bench.run.adapters():
        stack.add(name, bench.run.adapter(name))
    rows = list(bench.renderer.training_all(bench.talks))
    return Table(bench.base, bench.renderer, stack, bench.talks, rows, labels)


def test_members_learn_their_samples_with_seeds_of_their_own(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bag = Bag.of(bench.rows, 3, seed=4)
    tasks = bag.tasks(recipe_on(bench.base, seed=4), bench.valid, [5, 6])
    assert [task.recipe.train.seed for task in tasks] == [4, 5, 6]
    assert [task.rows for task in tasks] == [bag.rows_of(name) for name in bag.names]
    assert all(task.valid == bench.valid and task.token_ids == [5, 6] for task in tasks)
    assert len({task.name for task in tasks}) == 3


@pytest.mark.parametrize("how", ["hard", "soft", "logprob"])
def test_labels_out_of_the_bag_are_voted_by_those_that_did_not_learn_them(tmp_path: Path, how: Any) -> None:
    bench = Bench(tmp_path, is_labelled=True)
    bag = bagged(bench, 3)
    table = table_of(bench, LABELS)
    found = out_of_bag(bag, table, how)
    right, log_loss, alone = [], [], []
    for talk, names in zip(bench.talks, bag.unseen(), strict=True):
        said = []
        for name in names:
            with answering(table.stack, [name], Apart) as model:
                (of,) = classify_talks(model, bench.renderer, [talk], LABELS)
            said.append(torch.tensor([of[label] for label in LABELS]).double())
        if not said:
            continue
        votes = {
            "hard": sum(torch.nn.functional.one_hot(one.argmax(), 3).double() for one in said) / len(said),
            "soft": sum(said) / len(said),
            "logprob": (sum(one.log() for one in said) / len(said)).softmax(-1),
        }[how]
        right.append(LABELS[int(votes.argmax())] == talk.label)
        alone.append(sum(LABELS[int(one.argmax())] == talk.label for one in said) / len(said))
        log_loss.append(-float(votes[LABELS.index(str(talk.label))].clamp(min=1e-15).log()))
    assert found is not None and 0 < found["n"] == len(right) < len(bench.talks)
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["accuracy alone"] == pytest.approx(sum(alone) / len(alone))
    assert found["log loss"] == pytest.approx(sum(log_loss) / len(log_loss), abs=1e-4)


@pytest.mark.parametrize("how", ["hard", "soft", "logprob"])
def test_text_out_of_the_bag_has_the_loss_of_the_average(tmp_path: Path, how: Any) -> None:
    bench = Bench(tmp_path)
    bag = bagged(bench, 3)
    table = table_of(bench, ())
    found = out_of_bag(bag, table, how)
    assert found is not None and found["over"] == ("logprob" if how == "logprob" else "prob")
    values, alone = [], []
    for row, names in zip(bench.rows, bag.unseen(), strict=True):
        said = []
        for name in names:
            with answering(table.stack, [name], Apart) as model:
                said.append(torch.tensor(supervised_log_likelihoods(model, [row])[0]).double())
        if said:
            values += (torch.stack(said).exp().mean(0)).log().tolist()
            alone += torch.stack(said).mean(0).tolist()
    assert found["loss alone"] == pytest.approx(-sum(alone) / len(alone), abs=1e-5)
    if how == "logprob":
        assert found["loss"] < found["loss alone"] + 1e-9  # Jensen
    else:
        assert found["loss"] == pytest.approx(-sum(values) / len(values), abs=1e-5)


def test_rows_that_were_not_trained_on_are_not_counted_and_few_are_drawn(tmp_path: Path) -> None:
    bench = Bench(tmp_path, is_labelled=True)
    bag = bagged(bench, 3)
    table = table_of(bench, LABELS)
    more = replace(
        table, talks=[*bench.talks, *bench.held], rows=[*table.rows, *bench.renderer.training_all(bench.held)]
    )
    one, other = out_of_bag(bag, table, "soft"), out_of_bag(bag, more, "soft")
    assert one is not None and other is not None and one["n"] == other["n"] and one["accuracy"] == other["accuracy"]
    few = out_of_bag(bag, table, "soft", most=4)
    assert few is not None and few["n"] == 4 and few == out_of_bag(bag, table, "soft", most=4)


def test_where_nobody_left_anything_out_there_is_no_estimate(tmp_path: Path) -> None:
    bench = Bench(tmp_path, n_rows=6, is_labelled=True)
    bag = bagged(bench, 2, is_bootstrap=False)
    assert out_of_bag(bag, table_of(bench, LABELS), "soft") is None
