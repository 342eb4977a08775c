"""Everybody's losses are written once, whatever stops the run on its way."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.ensemble_world import Bench
from toolkit.bundle import Run
from toolkit.ensemble.curves import Curves
from toolkit.ensemble.experts import Hooks, Seen, Task, fit_members
from toolkit.track import Track, last_step, open_track, read_metrics

UNLIKE: dict[str, dict[str, Any]] = {
    "상냥": {"adapter": {"kind": "lora", "rank": 4}},
    "짧게": {"adapter": {"kind": "prefix", "tokens": 4}, "max_steps": 9},
    "reft": {"adapter": {"kind": "reft", "rank": 2}, "max_steps": 4, "seed": 5},
}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def tasks_of(bench: Bench) -> list[Task]:
    return [bench.task(name, **told) for name, told in UNLIKE.items()]


class Stopped(Exception):
    """As a kill, at a place of its own."""


def fit(bench: Bench, run: Run, tasks: Sequence[Task], *, stop: int | None = None, kill: int | None = None) -> bool:
    """Train with curves; after so many steps of all somebody wants to stop, or the process dies."""
    run.path.mkdir(exist_ok=True)
    track = open_track(run.path, (), {}, last_step(run.path), pytest.fail)
    curves, steps = Curves(run, track), 0

    def stepped(seen: Sequence[Seen]) -> None:
        nonlocal steps
        curves.stepped(seen)
        steps += 1
        if steps == kill:
            raise Stopped

    hooks = Hooks(
        wants_stop=lambda: stop is not None and steps >= stop, watch=stepped, begun=curves.begun, looked=curves.looked
    )
    done = fit_members(tasks, bench.base, run, plan_of=bench.plan_of, hooks=hooks)
    curves.close()
    track.close()
    return done is not None


def written(run: Run) -> dict[tuple[str, int], float]:
    """Every number of metrics.jsonl; each stands there once."""
    found = [(name, int(row["step"]), of) for row in read_metrics(run.path) for name, of in row.items()]
    kept = [(name, step, of) for name, step, of in found if name not in ("step", "time")]
    assert Counter((name, step) for name, step, _ in kept).most_common(1)[0][1] == 1
    return {(name, step): of for name, step, of in kept}


def test_every_step_and_every_look_of_everybody_is_written(bench: Bench) -> None:
    assert fit(bench, bench.run, tasks_of(bench))
    found = written(bench.run)
    steps = {name: sorted(step for key, step in found if key == f"loss/{name}") for name in UNLIKE}
    assert steps == {"상냥": [*range(1, 7)], "짧게": [*range(1, 10)], "reft": [*range(1, 5)]}
    for name, last in (("상냥", 6), ("짧게", 9), ("reft", 4)):
        assert found[f"valid_loss/{name}", last] > 0
    assert len(read_metrics(bench.run.path)) <= 9


@pytest.mark.parametrize("killed", [1, 3, 5])
def test_a_run_that_was_stopped_and_killed_has_every_number_once(bench: Bench, killed: int) -> None:
    whole = Run(bench.root / "whole")
    fit(bench, whole, tasks_of(bench))
    assert not fit(bench, bench.run, tasks_of(bench), stop=2)
    with pytest.raises(Stopped):
        fit(bench, bench.run, tasks_of(bench), kill=killed)
    assert fit(bench, bench.run, tasks_of(bench))
    assert written(bench.run) == written(whole)


def test_a_kill_before_the_first_checkpoint_leaves_nothing_behind(bench: Bench) -> None:
    whole = Run(bench.root / "whole")
    fit(bench, whole, tasks_of(bench))
    with pytest.raises(Stopped):
        fit(bench, bench.run, tasks_of(bench), kill=4)
    assert fit(bench, bench.run, tasks_of(bench))
    assert written(bench.run) == written(whole)


def test_a_member_killed_between_its_end_and_its_last_line_learns_its_last_steps_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, tasks = Run(bench.root / "whole"), tasks_of(bench)[:1]
    fit(bench, whole, tasks)
    monkeypatch.setattr(Curves, "stepped", dying(Curves.stepped, 6))
    with pytest.raises(Stopped):
        fit(bench, bench.run, tasks)
    monkeypatch.undo()
    assert bench.run.adapters() == ("상냥",)
    assert fit(bench, bench.run, tasks)
    assert written(bench.run) == written(whole)


def dying(inner: Callable[..., None], last: int) -> Callable[..., None]:
    def stepped(self: Curves, seen: Sequence[Seen]) -> None:
        if any(one.step == last for one in seen):
            raise Stopped
        inner(self, seen)

    return stepped


@pytest.mark.slow
def test_one_that_learns_alone_has_its_curve_too(bench: Bench) -> None:
    whole = Run(bench.root / "whole")
    tasks = [bench.task("dora", {"kind": "lora", "rank": 4, "dora": True}), bench.task("plain")]
    fit(bench, whole, tasks)
    assert not fit(bench, bench.run, tasks, stop=8)  # six of the stack, two alone
    assert fit(bench, bench.run, tasks)
    assert written(bench.run) == written(whole)
    assert {step for name, step in written(whole) if name == "loss/dora"} == {*range(1, 7)}


def test_numbers_of_a_gate_are_dropped_beyond_where_it_goes_on(tmp_path: Path) -> None:
    track, run = Track(tmp_path / "metrics.jsonl", {}, pytest.fail), Run(tmp_path)
    first = Curves(run, track)
    first.gate_begun(-1)
    for step in range(4):
        first.gate("valid_loss", step, 1.0)
        first.gate("loss", step + 1, 2.0)
    track.log(9, **{"test/loss": 3.0})
    again = Curves(run, track)
    again.gate_begun(2)
    assert {key for key, _ in written(run)} == {"gate/loss", "gate/valid_loss"}
    assert max(step for _, step in written(run)) == 2
    Curves(run, track).gate_begun(-1)
    assert read_metrics(tmp_path) == []
