"""Adapters of unlike recipes learn side by side into one run, and go on where they stopped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ensemble_world import Bench
from toolkit.bundle import Run
from toolkit.ensemble import experts as room
from toolkit.ensemble.experts import Hooks, Seen, Task, fit_members, read_fitted, together
from toolkit.errors import TrainingError
from toolkit.stack.stack import Stack

UNLIKE: dict[str, dict[str, Any]] = {
    "상냥": {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.1}},
    "짧게": {"adapter": {"kind": "prefix", "tokens": 4}, "max_steps": 9},
    "reft": {"adapter": {"kind": "reft", "rank": 2}, "max_steps": 4, "seed": 5},
}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def unlike(bench: Bench) -> list[Task]:
    return [bench.task(name, **told) for name, told in UNLIKE.items()]


def test_every_task_ends_as_an_adapter_and_a_word_how_it_went(bench: Bench) -> None:
    fitted = bench.fit(unlike(bench))
    assert fitted is not None and list(fitted) == list(UNLIKE)
    assert {name: one.steps for name, one in fitted.items()} == {"상냥": 6, "짧게": 9, "reft": 4}
    assert set(bench.run.adapters()) == set(UNLIKE)
    assert all(read_fitted(bench.run, name) == one for name, one in fitted.items())
    assert len(set(bench.hashes().values())) == 3


def test_each_is_as_it_would_be_alone(bench: Bench) -> None:
    bench.fit(unlike(bench))
    stack = Stack(bench.base.model, base_hash=bench.base.hash)
    for task in unlike(bench):
        alone = Run(bench.root / f"alone-{task.name}")
        bench.fit([task], run=alone)
        for place in (bench.run, alone):
            stack.add(place.path.name + task.name, place.adapter(task.name))
        left, right = (stack.adapter(place.path.name + task.name).tensors for place in (bench.run, alone))
        assert left.keys() == right.keys()
        assert max(float((left[key] - right[key]).abs().max()) for key in left) < 1e-3


def test_the_base_is_left_as_it_was(bench: Bench) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = bench.base.model(ids).logits
        bench.fit(unlike(bench))
        torch.testing.assert_close(bench.base.model(ids).logits, before, rtol=0, atol=0)


def test_whoever_is_done_is_not_trained_again(bench: Bench) -> None:
    tasks = unlike(bench)
    first = bench.fit(tasks[:2])
    before = bench.hashes()
    both = bench.fit(tasks)
    assert first is not None and both is not None
    assert {one.name for seen in bench.seen for one in seen} == {"reft"}
    assert {name: both[name] for name in first} == first
    assert {name: bench.hashes()[name] for name in before} == before


@pytest.mark.parametrize("after", [1, 3, 5])
def test_one_that_was_stopped_goes_on_to_the_same_bits(bench: Bench, after: int) -> None:
    whole = Run(bench.root / "whole")
    bench.fit(unlike(bench), run=whole)
    assert bench.fit(unlike(bench), stop_after=after) is None
    assert bench.fit(unlike(bench)) is not None
    assert bench.hashes() == bench.hashes(whole)


@pytest.mark.parametrize("often", [False, True])
def test_a_killed_run_keeps_whoever_was_done(bench: Bench, monkeypatch: pytest.MonkeyPatch, often: bool) -> None:
    """Killed between a member's end and the next checkpoint: what lies there stays, and all end with the same bits."""
    whole = Run(bench.root / "whole")
    bench.fit(unlike(bench), run=whole)
    if often:
        monkeypatch.setattr("toolkit.fit.many.CHECKPOINT_S", 0.0)
        monkeypatch.setattr("toolkit.fit.many.SAVE_SHARE", 0.0)

    def kill(seen: Any) -> None:
        if "reft" in bench.run.adapters():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_members(unlike(bench), bench.base, bench.run, plan_of=bench.plan_of, hooks=Hooks(watch=kill))
    assert bench.run.adapters() == ("reft",)
    assert read_fitted(bench.run, "reft") is not None
    assert bench.fit(unlike(bench)) is not None
    assert bench.hashes() == bench.hashes(whole)


def test_a_kill_while_it_is_written_down_that_all_are_done_makes_nobody_learn_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fit(unlike(bench))
    first = Run(bench.root / "first")
    told = room.disk.write_json

    def dying(file: Path, value: Any) -> None:
        is_last = all(read_fitted(first, name) is not None for name in UNLIKE)
        told(file, value)
        if is_last:
            raise KeyboardInterrupt

    monkeypatch.setattr(room.disk, "write_json", dying)
    with pytest.raises(KeyboardInterrupt):
        bench.fit(unlike(bench), run=first)
    monkeypatch.undo()
    assert bench.fit(unlike(bench), run=first) is not None
    assert bench.seen == [] and bench.hashes(first) == bench.hashes()


def test_a_kill_in_the_second_precision_makes_nobody_of_the_first_learn_again(bench: Bench) -> None:
    tasks = [bench.task("fp32"), bench.task("bf16", precision="bf16")]

    def kill(seen: Any) -> None:
        if {one.name for one in seen} == {"bf16"}:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_members(tasks, bench.base, bench.run, plan_of=bench.plan_of, hooks=Hooks(watch=kill))
    before = bench.hashes()
    assert bench.fit(tasks) is not None
    assert {one.name for seen in bench.seen for one in seen} == {"bf16"}
    assert bench.hashes()["fp32"] == before["fp32"]


def test_a_damaged_checkpoint_is_told_and_the_member_starts_anew(bench: Bench) -> None:
    whole = Run(bench.root / "whole")
    bench.fit(unlike(bench), run=whole)
    bench.fit(unlike(bench), stop_after=2)
    (saved,) = bench.run.checkpoints.glob("stack/stack-*/짧게/learner.json")
    size = saved.stat().st_size
    saved.write_text("x" * size, encoding="utf-8")
    assert bench.fit(unlike(bench)) is not None
    assert any("짧게" in line and "anew" in line for line in bench.said)
    assert bench.hashes() == bench.hashes(whole)


def test_one_that_runs_away_is_named_and_the_others_are_done(bench: Bench) -> None:
    wild = bench.task("wild", learning_rate=50.0, max_grad_norm=None)
    rows = [([*ids], [*labels]) for ids, labels in wild.rows]
    tasks = [bench.task("calm"), replace(wild, rows=rows, recipe=_wild(wild)), bench.task("뒤에", seed=3)]
    with pytest.raises(TrainingError, match=r"1 adapter could not.*\n  wild: step .*train\.learning_rate"):
        bench.fit(tasks)
    assert set(bench.run.adapters()) == {"calm", "뒤에"}
    assert read_fitted(bench.run, "wild") is None


def _wild(task: Task) -> Any:
    train = task.recipe.train.model_copy(update={"learning_rate": 1e30, "max_steps": 8})
    return task.recipe.model_copy(update={"train": train})


def test_a_recipe_that_does_not_fit_the_base_is_told_with_the_rest_done(bench: Bench) -> None:
    unfit = bench.task("unfit", {"kind": "lora", "rank": 4, "targets": ["없는_층"]})
    with pytest.raises(TrainingError, match=r"unfit: .*없는_층"):
        bench.fit([unfit, bench.task("fit")])
    assert bench.run.adapters() == ("fit",)


def test_as_many_learn_at_once_as_is_said(bench: Bench) -> None:
    bench.fit([bench.task(f"m{i}", seed=i) for i in range(4)], side_by_side=2)
    assert max(len(seen) for seen in bench.seen) == 2


def test_steps_are_seen_with_their_held_out_loss(bench: Bench) -> None:
    bench.fit([bench.task("one")])
    flat: list[Seen] = [one for seen in bench.seen for one in seen]
    assert [one.step for one in flat] == [1, 2, 3, 4, 5, 6] and {one.total for one in flat} == {6}
    assert flat[0].valid is None and flat[-1].valid is not None and flat[-1].n_tokens > flat[0].n_tokens


def test_a_name_stands_once(bench: Bench) -> None:
    with pytest.raises(ValueError, match="twice"):
        bench.fit([bench.task("one"), bench.task("one")])


class TestTogether:
    def tasks(self, bench: Bench, n: int, batch_size: int) -> list[Task]:
        return [bench.task(f"m{i}", batch_size=batch_size) for i in range(n)]

    def test_a_cpu_is_busy_with_few_tokens(self, bench: Bench) -> None:
        small, large = (together(self.tasks(bench, 12, size), 1024, 1e12, 1, "cpu") for size in (2, 64))
        assert large == 1 < small <= 12

    def test_a_gpu_takes_what_its_pass_holds_at_most_sixteen(self, bench: Bench) -> None:
        assert together(self.tasks(bench, 40, 4), 65_536, 1e12, 1, "cuda:0") == 16

    def test_memory_decides_where_members_are_large(self, bench: Bench) -> None:
        assert together(self.tasks(bench, 12, 1), 1024, 1e9, 25_000_000, "cpu") == 4


@pytest.mark.slow
@pytest.mark.parametrize("after", [None, 2])
def test_what_no_stack_holds_trains_alone_and_goes_on(bench: Bench, after: int | None) -> None:
    tasks = [
        bench.task("dora", {"kind": "lora", "rank": 4, "dora": True}),
        bench.task("plain"),
        bench.task("all", {"kind": "full"}, learning_rate=1e-3),
    ]
    if after is not None:
        whole = Run(bench.root / "whole")
        assert bench.fit(tasks, run=whole) is not None
        bench.said.clear()
        assert bench.fit(tasks[:1], stop_after=after) is None
        assert bench.run.adapters() == ()
    fitted = bench.fit(tasks)
    assert fitted is not None and list(fitted) == ["dora", "plain", "all"]
    told = [line for line in bench.said if "No stack trains" in line]
    assert "dora (lora with DoRA)" in told[-1] and "all (full)" in told[-1] and "plain" not in told[-1]
    assert {one.best_loss is not None for one in fitted.values()} == {True}
    assert (bench.run.adapter("all") / "config.json").is_file()
    assert (bench.run.adapter("dora") / "adapter_config.json").is_file()
    if after is not None:
        name = "adapter_model.safetensors"
        assert (bench.run.adapter("dora") / name).read_bytes() == (whole.adapter("dora") / name).read_bytes()
