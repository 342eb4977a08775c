"""Where a study is kept: a journal that is torn, a database file, a real PostgreSQL."""

import contextlib
import dataclasses
import errno
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from tests.search_world import (
    ROOT,
    Postgres,
    Time,
    Told,
    identity_of,
    make_recipe,
    open_study,
    running_postgres,
    try_one,
    why_no_postgres,
    work,
    write_recipe,
)
from toolkit.errors import DiskError, RunError, SearchError
from toolkit.search import journal as journal_module
from toolkit.search.journal import Journal, Lock
from toolkit.search.storage import JOURNAL

needs_postgres = pytest.mark.skipif(why_no_postgres() is not None, reason=str(why_no_postgres()))


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


def two_trials(folder: Path, **search: Any) -> Path:
    """A journal with two finished trials."""
    study = open_study(make_recipe(folder, pruner="none", **search), folder / "search")
    for _ in range(2):
        try_one(study, study.ask())
    study.leave()
    return folder / "search" / JOURNAL


@pytest.mark.parametrize("n_bytes", (1, 7, 40))
def test_a_journal_torn_in_the_middle_of_its_last_line_goes_on(tmp_path: Path, n_bytes: int) -> None:
    file = two_trials(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-n_bytes])
    study = open_study(make_recipe(tmp_path, pruner="none"), tmp_path / "search")
    assert [trial.state for trial in study.trials()] == [TrialState.COMPLETE] * 2
    try_one(study, study.ask())
    assert all(json.loads(line) for line in file.read_bytes().splitlines())
    assert len(open_study(make_recipe(tmp_path, pruner="none"), tmp_path / "search").trials()) == 3


def test_a_journal_torn_in_the_first_line_goes_on(tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / JOURNAL).write_bytes(b'{"op_code":0,"worker_id":"x","study_na')
    assert len(work(open_study(make_recipe(tmp_path, trials=2), tmp_path / "search"))) == 2


def test_a_line_torn_by_a_killed_worker_is_mended_by_one_that_is_under_way(tmp_path: Path) -> None:
    file = two_trials(tmp_path)
    study = open_study(make_recipe(tmp_path, pruner="none"), tmp_path / "search")
    asked = study.ask()
    with file.open("ab") as torn:
        torn.write(b'{"op_code":7,"worker_id":"another","tri')
    try_one(study, asked)
    assert study.trials()[2].state == TrialState.COMPLETE
    assert all(json.loads(line) for line in file.read_bytes().splitlines())


def test_a_record_that_grew_onto_half_a_line_is_kept(tmp_path: Path) -> None:
    file = two_trials(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:-1], b'{"op_code":9,"worker_', lines[-1]]))
    say = Told()
    study = open_study(make_recipe(tmp_path, pruner="none"), tmp_path / "search", say=say)
    assert [trial.state for trial in study.trials()] == [TrialState.COMPLETE] * 2
    assert file.read_bytes().startswith(b"".join(lines))
    assert "1 torn line left out" in str(say)


def test_a_line_that_breaks_while_a_worker_is_under_way_is_left_out(tmp_path: Path) -> None:
    file = two_trials(tmp_path)
    say = Told()
    study = open_study(make_recipe(tmp_path, pruner="none"), tmp_path / "search", say=say)
    asked = study.ask()
    line = file.read_bytes().splitlines(keepends=True)[-1]
    with file.open("ab") as other:  # a tool that does not look at the end before it writes
        other.write(b'{"op_code":7,"worker_id":"ano' + b'"' + b"\n" + line)
    try_one(study, asked)
    assert study.trials()[2].state == TrialState.COMPLETE
    assert "torn line" in str(say)


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / JOURNAL).write_text('{"op_code":"seven"}\n')
    with pytest.raises(SearchError, match=r"cannot be read as the journal.*--fresh"):
        open_study(make_recipe(tmp_path), tmp_path / "search")


def test_a_lock_that_a_killed_worker_left_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "HELD_S", 0.05)
    file = two_trials(tmp_path)
    Lock(file).acquire()
    assert os.readlink(f"{file}.lock") == JOURNAL  # Optuna's own lock looks where this leads, and must find something
    moved = tmp_path / "moved"
    file.parent.rename(moved)
    study = open_study(make_recipe(tmp_path, pruner="none"), moved)
    assert study.ask() is not None
    assert not os.path.lexists(moved / f"{JOURNAL}.lock")


def test_a_lock_that_changes_hands_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Lock(tmp_path / "j")
    lock.acquire()
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 5:
            lock.release()

    monkeypatch.setattr(journal_module.time, "sleep", wait)
    assert Lock(tmp_path / "j").acquire()
    assert len(waits) == 5


@pytest.mark.parametrize("n_written", (0, 1, 25))
def test_a_full_disk_in_the_middle_of_a_study_loses_nothing_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_written: int
) -> None:
    study = open_study(make_recipe(tmp_path, pruner="none"), tmp_path / "search")
    study.ask()
    study.report(0, 1, 2.0)
    file = tmp_path / "search" / JOURNAL
    before, write = file.read_bytes(), os.write

    def full(fd: int, data: Any) -> int:
        if n_written and os.fstat(fd).st_size == len(before):
            return write(fd, data[:n_written])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        with pytest.raises(DiskError, match=r"journal\.log: cannot be written .*No space left"):
            study.report(0, 2, 1.5)
    assert file.read_bytes() == before
    assert study.trials()[0].intermediate_values == {1: 2.0}
    study.report(0, 2, 1.5)
    study.finish(0, 1.5, {})
    assert open_study(make_recipe(tmp_path, pruner="none"), tmp_path / "search").trials()[0].intermediate_values == {
        1: 2.0,
        2: 1.5,
    }


def test_half_a_line_that_cannot_be_taken_back_is_cut_by_the_next_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(make_recipe(tmp_path, pruner="none"), tmp_path / "search")
    study.ask()
    write, truncate, file = os.write, os.ftruncate, tmp_path / "search" / JOURNAL
    n_whole = file.stat().st_size

    def full(fd: int, data: Any) -> int:
        if os.fstat(fd).st_size == n_whole:
            return write(fd, data[:30])
        raise OSError(errno.ENOSPC, "No space left on device")

    def stuck(fd: int, size: int) -> None:
        if os.fstat(fd).st_size != size:
            raise OSError(errno.EIO, "Input/output error")
        truncate(fd, size)

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        disk.setattr(os, "ftruncate", stuck)
        with pytest.raises(DiskError):
            study.report(0, 1, 1.5)
    assert file.stat().st_size == n_whole + 30
    study.report(0, 1, 1.5)
    assert study.trials()[0].intermediate_values == {1: 1.5}


def test_a_real_limit_on_the_files_size_is_a_disk_error_and_the_study_goes_on(tmp_path: Path) -> None:
    make_recipe(tmp_path, pruner="none")
    code = """
import resource, sys
from pathlib import Path
from tests.search_world import open_study, make_recipe
from toolkit.errors import DiskError
folder = Path(sys.argv[1])
study = open_study(make_recipe(folder, pruner="none"), folder / "search")
study.ask()
size = (folder / "search" / "journal.log").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
try:
    study.report(0, 1, 1.5)
except DiskError as full:
    print(full)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
study.report(0, 1, 1.25)
print(study.trials()[0].intermediate_values)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout
    assert "{1: 1.25}" in done.stdout


def test_a_journal_that_cannot_be_made_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot be written"):
        Journal(tmp_path / "missing" / JOURNAL)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=[needs_postgres, pytest.mark.slow])])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a fresh database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/연구.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.url(f"db_{abs(hash(str(tmp_path))) % 10**9}")


def test_a_database_keeps_a_study_for_the_next_worker(tmp_path: Path, storage: str) -> None:
    recipe = make_recipe(tmp_path, storage=storage, trials=6, pruner="median")
    first = open_study(recipe, tmp_path / "search")
    for _ in range(3):
        try_one(first, first.ask())
    first.leave()
    second = open_study(recipe, tmp_path / "elsewhere")
    assert work(second) == [3, 4, 5]
    assert second.is_over()
    best = second.best()
    assert best is not None and best.user_attrs["steps"] == 9
    assert list((tmp_path / "search").iterdir()) == []
    second.leave()


def test_the_same_study_in_a_database_and_in_a_journal(tmp_path: Path, storage: str) -> None:
    values = []
    for name, place in (("a", None), ("b", storage)):
        study = open_study(make_recipe(tmp_path, storage=place, trials=8), tmp_path / name)
        work(study)
        values.append([(trial.params, trial.state, trial.value) for trial in study.trials()])
        study.leave()
    assert values[0] == values[1]


def test_a_changed_recipe_is_refused_by_a_database(tmp_path: Path, storage: str) -> None:
    open_study(make_recipe(tmp_path, storage=storage), tmp_path / "search").leave()
    with pytest.raises(RunError, match=r"search\.sampler: tpe became random[^!]*or another search\.storage") as caught:
        open_study(make_recipe(tmp_path, storage=storage, sampler="random"), tmp_path / "search")
    assert "geheim" not in str(caught.value)


def test_no_password_is_kept_in_the_study(tmp_path: Path, storage: str) -> None:
    study = open_study(make_recipe(tmp_path, storage=storage), tmp_path / "search")
    assert "search.sampler" in str(study.optuna.user_attrs)
    assert storage not in str(study.optuna.user_attrs)
    assert "geheim" not in str(study.optuna.user_attrs)
    study.leave()


def test_a_study_of_the_same_name_that_no_recipe_began_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    storage = f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setattr(optuna.logging.get_logger("optuna"), "disabled", True)
    other = optuna.create_study(storage=storage, study_name="말투")
    other.tell(other.ask(), 1.0)
    recipe = make_recipe(tmp_path, storage=storage)
    with pytest.raises(RunError, match="1 trials that was not begun by a recipe"):
        open_study(recipe, tmp_path / "search", identity=identity_of(recipe))


@needs_postgres
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ("postgresql", "postgresql+psycopg"))
def test_both_ways_to_write_a_postgresql_address(tmp_path: Path, postgres: Postgres, scheme: str) -> None:
    url = postgres.url(f"scheme_{len(scheme)}", scheme)
    file = write_recipe(tmp_path, storage=url)
    assert scheme in file.read_text(encoding="utf-8")
    study = open_study(make_recipe(tmp_path, storage=url), tmp_path / "search")
    assert study.ask() is not None
    study.leave()


def test_a_file_system_without_links_is_locked_by_a_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    file = two_trials(tmp_path)
    lock = Lock(file)
    lock.acquire()
    held = file.with_name(f"{JOURNAL}.lock")
    assert held.is_file()
    assert not Lock(file)._take()
    lock.release()
    assert not held.exists()


def test_a_trial_that_waits_in_the_storage_does_not_use_up_the_budget(tmp_path: Path) -> None:
    study = open_study(make_recipe(tmp_path, trials=2), tmp_path / "search")
    study.optuna.enqueue_trial({"train.batch_size": 4})
    assert work(study) == [1, 2]
    assert study.is_over()


def answer_lost(study: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """From now on the first answer of a storage's call gets lost, after the call was carried out."""
    real, calls = getattr(study._kept, name), []

    def once(*arguments: Any, **named: Any) -> Any:
        answer = real(*arguments, **named)
        calls.append(1)
        if len(calls) == 1:
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))
        return answer

    monkeypatch.setattr(study._kept, name, once)
    return calls


def test_a_trial_is_made_once_though_the_answer_got_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(make_recipe(tmp_path, trials=3), tmp_path / "search", clock=Time().clock())
    calls = answer_lost(study, monkeypatch, "create_new_trial")
    assert [asked.number for _ in range(4) if (asked := study.ask()) is not None] == [0, 1, 2]
    assert len(calls) == 3
    assert len(study.optuna.trials) == 3


@pytest.mark.parametrize("end", ("finish", "prune", "fail"))
def test_a_trial_is_ended_once_though_the_answer_got_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    say = Told()
    study = open_study(make_recipe(tmp_path), tmp_path / "search", clock=Time().clock(), say=say)
    study.ask()
    study.report(0, 1, 2.0)
    answer_lost(study, monkeypatch, "set_trial_state_values")
    {"finish": lambda: study.finish(0, 2.0, {"steps": 3}), "prune": lambda: study.prune(0, {"steps": 3})}.get(
        end, lambda: study.fail(0, "no memory", {"steps": 3})
    )()
    assert study.trials()[0].state.is_finished()
    assert study.trials()[0].user_attrs["steps"] == 3
    assert "taken for lost" not in str(say)
    assert "server closed the connection unexpectedly" in say.lines[0]


def test_what_a_database_says_is_shown_in_one_line_without_the_password(tmp_path: Path) -> None:
    study = open_study(make_recipe(tmp_path), tmp_path / "search")
    storage = dataclasses.replace(study._storage, secrets=("geheim!",))
    said = storage.first_line(OperationalError("", {}, Exception("  no   entry for geheim!.\nDETAIL: more")))
    assert said == "no entry for ***"


def test_the_tables_of_another_version_of_optuna_are_named(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/old.db"
    open_study(make_recipe(tmp_path, storage=storage), tmp_path / "search").leave()
    with contextlib.closing(sqlite3.connect(tmp_path / "old.db")) as old, old:
        old.execute("UPDATE version_info SET schema_version = 1")
        old.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    with pytest.raises(SearchError, match=r"old\.db: .*optuna storage upgrade --storage URL"):
        open_study(make_recipe(tmp_path, storage=storage), tmp_path / "search")
