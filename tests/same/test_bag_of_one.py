"""A bag of one member without a sample is plain training."""

from pathlib import Path

import pytest
import torch

from tests.ensemble_world import Bench
from toolkit.bundle import Run
from toolkit.ensemble.bag import Bag
from toolkit.ensemble.experts import Task
from toolkit.stack.adapter import Adapter, read_adapter


def bag_of_one(bench: Bench, task: Task, *, is_bootstrap: bool = False) -> Adapter:
    bag = Bag.of(task.rows, 1, seed=task.recipe.train.seed, is_bootstrap=is_bootstrap)
    bench.fit(bag.tasks(task.recipe, task.valid))
    return read_adapter(bench.run.adapter(bag.names[0]), bench.base.model)


@pytest.mark.parametrize("kind", ["lora", "prefix", "reft"])
def test_a_bag_of_one_has_the_bits_of_plain_training_in_a_stack(kind: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    task = bench.task("main", {"kind": kind}, seed=7)
    alone = Run(tmp_path / "alone")
    bench.fit([task], run=alone)
    plain = read_adapter(alone.adapter("main"), bench.base.model)
    bagged = bag_of_one(bench, task)
    assert plain.tensors.keys() == bagged.tensors.keys()
    for key, tensor in plain.tensors.items():
        torch.testing.assert_close(bagged.tensors[key], tensor, rtol=0, atol=0)


def test_a_sample_makes_another(tmp_path: Path) -> None:
    """The control: where rows are drawn the bits differ."""
    bench = Bench(tmp_path)
    task = bench.task("main", seed=7)
    alone = Run(tmp_path / "alone")
    bench.fit([task], run=alone)
    drawn = bag_of_one(bench, task, is_bootstrap=True)
    assert drawn.hash != read_adapter(alone.adapter("main"), bench.base.model).hash


@pytest.mark.slow
def test_a_bag_of_one_is_what_one_fit_trains(tmp_path: Path) -> None:
    """Through TRL and PEFT the order of sums differs, so rounding may, and Adam makes it larger with the rate."""
    from toolkit.fit.alone import Lesson, Silent, fit_worn, wear

    bench = Bench(tmp_path)
    task = bench.task("main", learning_rate=1e-3, max_steps=12, seed=7)
    worn = wear(task.recipe, bench.base.device, None)
    lesson = Lesson(task.recipe, bench.plan_of(task.recipe, task.rows), task.rows, None)
    run = Run(tmp_path / "one")
    run.path.mkdir()
    fit_worn(worn, lesson, run, Silent(lesson.n_steps, bench.said.append, lambda: False, lambda *_: None))
    (tmp_path / "saved").mkdir()
    worn.save(tmp_path / "saved")
    plain = read_adapter(tmp_path / "saved", bench.base.model)
    bagged = bag_of_one(bench, Task("main", task.recipe, task.rows, ()))
    apart = max(float((bagged.tensors[key] - tensor).abs().max()) for key, tensor in plain.tensors.items())
    start = bag_of_one_start(bench, task)
    moved = max(float((bagged.tensors[key] - tensor).abs().max()) for key, tensor in start.tensors.items())
    assert moved > 3e-3 and apart < 0.02 * 1e-3 * 12


def bag_of_one_start(bench: Bench, task: Task) -> Adapter:
    from toolkit.ensemble.experts import new_of

    return new_of(task, bench.base)
