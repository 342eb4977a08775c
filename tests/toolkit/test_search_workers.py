"""Several workers on one study, real processes among them that are killed: no trial is lost, none is tried twice."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from tests.search_world import (
    Postgres,
    Time,
    Told,
    make_recipe,
    open_study,
    running_postgres,
    start_worker,
    tried_by,
    try_one,
    wait_for_line,
    why_no_postgres,
    work,
    write_recipe,
)
from toolkit.search import ledger
from toolkit.search.study import BEAT_S, LOOK_S, Study
from toolkit.search.workers import LONGEST_LOOK_S, SILENCE_S, Watch, Worker, started_at

needs_postgres = pytest.mark.skipif(why_no_postgres() is not None, reason=str(why_no_postgres()))
N_TRIALS = 10


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["journal", "sqlite", pytest.param("postgresql", marks=needs_postgres)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """A fresh place for a study, of each kind."""
    if request.param == "journal":
        return None
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/study.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.url(f"db_{abs(hash(str(tmp_path))) % 10**9}")


@pytest.fixture
def workers() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for worker in started:
        worker.kill()
        worker.communicate()


def check_budget(study: Study, n_trials: int) -> None:
    """Every number once, the budget kept exactly, nothing left running, nothing lost that was not asked again."""
    everything = study.optuna.trials
    assert [trial.number for trial in everything] == list(range(len(everything)))
    assert not ledger.running(everything)
    assert ledger.to_ask_again(everything) == []
    ended = [one for one in everything if not ledger.is_void(one) and not ledger.is_lost(one)]
    assert len(ended) == n_trials
    assert all(one.state in (TrialState.COMPLETE, TrialState.PRUNED) for one in ended)


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", (2, 3))
def test_workers_on_one_study_try_every_trial_once_and_keep_the_budget(
    tmp_path: Path, storage: str | None, workers: list[subprocess.Popen[str]], n_workers: int
) -> None:
    file = write_recipe(tmp_path, storage=storage, trials=N_TRIALS, pruner="median")
    workers += [start_worker(file, tmp_path / "search", 0.01) for _ in range(n_workers)]
    tried = [tried_by(worker) for worker in workers]
    numbers = Counter(one["number"] for lines in tried for one in lines)
    assert set(numbers.values()) == {1}
    assert len(numbers) == N_TRIALS
    study = open_study(make_recipe(tmp_path, storage=storage, trials=N_TRIALS, pruner="median"), tmp_path / "search")
    check_budget(study, N_TRIALS)
    assert set(numbers) == {trial.number for trial in study.trials()}
    assert sum(len(lines) > 0 for lines in tried) >= 2
    study.leave()


@pytest.mark.slow
def test_the_trial_of_a_killed_worker_is_noticed_and_asked_again_with_the_same_values(
    tmp_path: Path, storage: str | None, workers: list[subprocess.Popen[str]]
) -> None:
    file = write_recipe(tmp_path, storage=storage, trials=5, pruner="none")
    recipe = make_recipe(tmp_path, storage=storage, trials=5, pruner="none")
    workers.append(start_worker(file, tmp_path / "search", 0, 1))
    told = wait_for_line(workers[0], "hangs")
    other = open_study(recipe, tmp_path / "search", say=(say := Told()))
    assert other.beat() == []
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].wait()
    asked = other.ask()
    hung = next(line for line in told if line.get("number") == 1)
    assert asked is not None
    assert (asked.number, asked.again_of, asked.params) == (2, 1, hung["params"])
    assert list(asked.values) == [1, 2]
    assert other.beat() == [1]
    assert "Trial 1 was lost with its process" in str(say)
    lost = other.trials()[1]
    assert (lost.state, lost.user_attrs["reason"]) == (TrialState.FAIL, "lost")
    try_one(other, asked)
    work(other)
    check_budget(other, 5)
    other.leave()


@pytest.mark.slow
def test_two_workers_that_find_a_third_dead_ask_its_trial_again_once(
    tmp_path: Path, storage: str | None, workers: list[subprocess.Popen[str]]
) -> None:
    file = write_recipe(tmp_path, storage=storage, trials=6, pruner="none")
    workers.append(start_worker(file, tmp_path / "search", 0, 1))
    wait_for_line(workers[0], "hangs")
    workers += [start_worker(file, tmp_path / "search", 0.1) for _ in range(2)]
    for worker in workers[1:]:
        wait_for_line(worker, "params")
    os.kill(workers[0].pid, signal.SIGKILL)
    for worker in workers[1:]:
        tried_by(worker)
    recipe = make_recipe(tmp_path, storage=storage, trials=6, pruner="none")
    study = open_study(recipe, tmp_path / "search")
    check_budget(study, 6)
    assert [ledger.again_of(trial) for trial in study.trials()].count(1) == 1
    study.leave()


@pytest.mark.slow
def test_workers_killed_at_any_moment_lose_nothing(
    tmp_path: Path, storage: str | None, workers: list[subprocess.Popen[str]]
) -> None:
    file = write_recipe(tmp_path, storage=storage, trials=10)
    for _ in range(3):
        workers.append(start_worker(file, tmp_path / "search", 0.03))
        for _ in range(2):
            wait_for_line(workers[-1], "params")
        os.kill(workers[-1].pid, signal.SIGKILL)
        workers[-1].wait()
    recipe = make_recipe(tmp_path, storage=storage, trials=10)
    study = open_study(recipe, tmp_path / "search")
    work(study)
    check_budget(study, 10)
    assert any(ledger.is_lost(trial) for trial in study.trials())
    study.leave()


def test_a_worker_that_left_is_not_waited_for(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, trials=2)
    gone, other = (open_study(recipe, tmp_path / "search") for _ in range(2))
    first = gone.ask()
    gone.leave()
    asked = other.ask()
    assert first is not None and asked is not None
    assert (asked.again_of, asked.params) == (first.number, first.params)


def gone(index: int) -> Worker:
    """A worker of this machine whose process is no more."""
    here = Worker.here()
    return Worker(f"gone-{index}", here.host, 4_999_999, 1.0, index)


def test_a_trial_that_is_lost_again_and_again_is_given_up(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, trials=1)
    for index in range(ledger.MOST_ATTEMPTS):
        assert open_study(recipe, tmp_path / "search", worker=gone(index)).ask() is not None
    last = open_study(recipe, tmp_path / "search")
    assert last.ask() is None
    assert last.is_over()
    assert last.trials()[-1].user_attrs["reason"] == f"its process died {ledger.MOST_ATTEMPTS} times"


def test_a_worker_that_was_asked_to_stop_costs_its_trial_no_attempt(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, trials=1)
    for _ in range(2 * ledger.MOST_ATTEMPTS):
        study = open_study(recipe, tmp_path / "search")
        assert study.ask() is not None
        study.leave()
    last = open_study(recipe, tmp_path / "search")
    assert last.ask() is not None
    assert {trial.user_attrs["reason"] for trial in last.trials()[:-1]} == {ledger.LEFT}


def elsewhere(index: int = 1) -> Worker:
    """A worker on another machine."""
    return Worker(f"there-{index}", "there/00000000", 1, 5.0, index)


def test_a_worker_on_another_machine_is_dead_when_its_beat_stands_still_for_a_minute(tmp_path: Path) -> None:
    time, away = Time(), Time()
    recipe = make_recipe(tmp_path, trials=4)
    there = open_study(recipe, tmp_path / "search", worker=elsewhere(), clock=away.clock())
    here = open_study(recipe, tmp_path / "search", clock=time.clock())
    there.ask()
    for _ in range(30):  # it lives: its beat changes
        time.t += LOOK_S
        away.t += BEAT_S
        there.beat()
        assert here.beat() == []
    found = []
    while not found:
        time.t += LOOK_S
        found = here.beat()
        assert here._clock.now() < 10_000
    assert found == [0]
    assert time.t == pytest.approx(1000 + 30 * LOOK_S + SILENCE_S, abs=2 * LOOK_S)


def test_a_worker_that_was_taken_for_lost_is_told_to_stop_and_what_it_tells_does_not_count(tmp_path: Path) -> None:
    time = Time()
    recipe = make_recipe(tmp_path, trials=2)
    say = Told()
    there = open_study(recipe, tmp_path / "search", worker=elsewhere(), clock=Time().clock(), say=say)
    here = open_study(recipe, tmp_path / "search", clock=time.clock())
    slow = there.ask()
    assert slow is not None
    there.report(slow.number, 1, 2.0)
    for _ in range(20):
        time.t += LOOK_S
        here.beat()
    again = here.ask()
    assert again is not None and again.again_of == slow.number
    there.report(slow.number, 2, 1.0)
    assert there.should_prune(slow.number)
    there.finish(slow.number, 1.0, {})
    assert len(say.lines) == 1 and "was taken for lost" in say.lines[0]
    assert here.trials()[slow.number].user_attrs["reason"] == "lost"
    assert here.trials()[slow.number].intermediate_values == {1: 2.0}


def test_the_time_in_which_nobody_looked_does_not_make_a_worker_dead() -> None:
    time = Time()
    watch = Watch(Worker.here(), lambda: time.t)
    told = {"there": {**elsewhere().facts(), "beat": 1}}
    told["there"]["name"] = "there"
    assert watch.dead(told) == frozenset()
    time.t += 100_000  # the storage was down, or the machine slept
    assert watch.dead(told) == frozenset()
    for _ in range(int(SILENCE_S / LONGEST_LOOK_S)):
        time.t += LONGEST_LOOK_S
        dead = watch.dead(told)
    assert dead == {"there"}


def facts_of(worker: Worker, **other: Any) -> dict[str, dict[str, Any]]:
    return {worker.name: {**worker.facts(), "beat": 1, **other}}


def test_a_process_of_this_machine_is_looked_up() -> None:
    watch = Watch(Worker.here(), lambda: 0.0)
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = Worker.here()
    other = Worker("other", here.host, alive.pid, started_at(alive.pid) or 0.0, 1)
    assert watch.dead(facts_of(other)) == frozenset()
    alive.kill()
    os.waitid(os.P_PID, alive.pid, os.WEXITED | os.WNOWAIT)  # gone, and nobody has asked how it ended
    assert watch.dead(facts_of(other)) == {"other"}
    alive.communicate()
    assert watch.dead(facts_of(other)) == {"other"}


def test_a_process_number_that_another_process_has_now_is_not_the_worker() -> None:
    here = Worker.here()
    other = Worker("other", here.host, here.pid, here.started - 500, 1)
    assert Watch(here, lambda: 0.0).dead(facts_of(other)) == {"other"}


def test_a_process_that_may_not_be_looked_at_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Worker.here()
    other = Worker("other", here.host, here.pid, here.started - 500, 1)
    monkeypatch.setattr("toolkit.search.workers.started_at", lambda pid: float("nan"))
    assert Watch(here, lambda: 0.0).dead(facts_of(other)) == frozenset()


def test_one_process_has_a_name_of_its_own_each_time_it_opens_a_study() -> None:
    a, b = Worker.here(1), Worker.here(1)
    assert a.name != b.name
    assert (a.host, a.pid, a.started, a.index) == (b.host, b.pid, b.started, 1)
