"""A storage that cannot be reached: at the start a clear error without the password, under way it is waited for."""

import contextlib
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from tests.search_world import (
    Postgres,
    Time,
    Told,
    make_recipe,
    open_study,
    running_postgres,
    why_no_postgres,
    work,
)
from toolkit.errors import DiskError, SearchError
from toolkit.search import storage as storage_module
from toolkit.search.storage import GIVE_UP_S, LONGEST_PAUSE_S

needs_postgres = pytest.mark.skipif(why_no_postgres() is not None, reason=str(why_no_postgres()))


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def nobody() -> Iterator[int]:
    """A port at which nobody answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_server_that_is_down_at_the_start_is_named_without_its_password(tmp_path: Path, nobody: int) -> None:
    recipe = make_recipe(tmp_path, storage=f"postgresql://maltu:geheim%21@127.0.0.1:{nobody}/study")
    time = Time()
    with pytest.raises(SearchError) as caught:
        open_study(recipe, tmp_path / "search", clock=time.clock())
    told = str(caught.value)
    assert f"127.0.0.1:{nobody}/study: cannot be reached as search.storage" in told
    assert "Start the server, or check host, port, user and password" in told
    assert "geheim" not in told
    assert caught.value.exit_code == 2
    assert caught.value.__suppress_context__
    assert time.slept == []


def test_a_password_in_the_query_is_not_shown_either(tmp_path: Path, nobody: int) -> None:
    recipe = make_recipe(tmp_path, storage=f"postgresql://maltu@127.0.0.1:{nobody}/study?password=geheim!")
    with pytest.raises(SearchError) as caught:
        open_study(recipe, tmp_path / "search")
    assert "geheim" not in str(caught.value)


def test_a_host_that_does_not_exist(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, storage="postgresql://maltu:geheim@nowhere.invalid/study")
    with pytest.raises(SearchError, match=r"^nowhere\.invalid/study: cannot be reached"):
        open_study(recipe, tmp_path / "search")


def test_a_database_file_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "missing").mkdir()
    recipe = make_recipe(tmp_path, storage=f"sqlite:///{tmp_path}/missing/study.db")
    (tmp_path / "missing").rmdir()
    with pytest.raises(SearchError, match=r"missing/study\.db: cannot be opened .* Check that its folder exists"):
        open_study(recipe, tmp_path / "search")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("오늘 뭐 먹지?\n" * 100, encoding="utf-8")
    recipe = make_recipe(tmp_path, storage=f"sqlite:///{tmp_path}/study.db")
    with pytest.raises(SearchError, match=r"study\.db: refused what was asked of it \(file is not a database\)"):
        open_study(recipe, tmp_path / "search")


def test_a_locked_database_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "LOCKED_S", 0.05)
    recipe = make_recipe(tmp_path, storage=f"sqlite:///{tmp_path}/study.db", pruner="none")
    time, say = Time(), Told()
    study = open_study(recipe, tmp_path / "search", clock=time.clock(), say=say)
    study.ask()
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        time.at_sleep = lambda: other.execute("COMMIT") if len(time.slept) == 3 else None
        study.report(0, 1, 2.5)
    assert study.trials()[0].intermediate_values == {1: 2.5}
    assert time.slept == [1.0, 2.0, 4.0]
    assert "cannot be reached (database is locked). Trying again for 10 minutes." in say.lines[0]
    assert say.lines[1].endswith("is back.") and len(say.lines) == 2
    study.leave()


def test_a_full_database_is_a_disk_error_and_the_next_report_works(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, storage=f"sqlite:///{tmp_path}/study.db", pruner="none")
    study = open_study(recipe, tmp_path / "search")
    study.ask()
    study.report(0, 1, 2.0)
    engine = study._storage.engine
    assert engine is not None
    with engine.connect() as connection:
        most = [connection.exec_driver_sql("PRAGMA page_count").scalar_one()]
    limit = lambda connection, *_: connection.execute(f"PRAGMA max_page_count = {most[0]}").close()  # noqa: E731
    sqlalchemy.event.listen(engine, "checkout", limit)
    with pytest.raises(DiskError, match=r"study\.db: cannot be written \(database or disk is full\)"):
        study.fail(0, "x" * 1_000_000, {})
    assert study.trials()[0].intermediate_values == {1: 2.0}
    most[0] = 1_000_000
    study.report(0, 2, 1.5)
    study.finish(0, 1.5, {})
    best = study.best()
    assert best is not None and best.intermediate_values == {1: 2.0, 2: 1.5}
    study.leave()


@needs_postgres
@pytest.mark.slow
def test_a_server_that_stops_and_starts_again_gets_what_is_reported_meanwhile(
    tmp_path: Path, postgres: Postgres
) -> None:
    recipe = make_recipe(tmp_path, storage=postgres.url("stops"), trials=3, pruner="median")
    time, say = Time(), Told()
    study = open_study(recipe, tmp_path / "search", clock=time.clock(), say=say)
    study.ask()
    study.report(0, 1, 2.0)
    postgres.stop()
    time.at_sleep = lambda: postgres.start() if len(time.slept) == 2 else None
    study.report(0, 2, 1.5)
    assert study.trials()[0].intermediate_values == {1: 2.0, 2: 1.5}
    assert time.slept == [1.0, 2.0]
    assert len(say.lines) == 2
    assert f"127.0.0.1:{postgres.port}/stops cannot be reached" in say.lines[0]
    assert "geheim" not in str(say)

    time.slept.clear()  # and between two trials
    study.finish(0, 1.5, {"steps": 2})
    postgres.stop()
    assert work(study) == [1, 2]
    assert study.is_over()
    assert [trial.number for trial in study.optuna.trials] == [0, 1, 2]
    study.leave()


@needs_postgres
@pytest.mark.slow
def test_a_server_that_was_restarted_between_two_reports_is_not_waited_for(tmp_path: Path, postgres: Postgres) -> None:
    recipe = make_recipe(tmp_path, storage=postgres.url("restarted"))
    time, say = Time(), Told()
    study = open_study(recipe, tmp_path / "search", clock=time.clock(), say=say)
    study.ask()
    postgres.stop()
    postgres.start()
    study.report(0, 1, 2.0)
    assert study.trials()[0].intermediate_values == {1: 2.0}
    assert (time.slept, say.lines) == ([], [])
    study.leave()


@needs_postgres
@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_search_after_ten_minutes(tmp_path: Path, postgres: Postgres) -> None:
    recipe = make_recipe(tmp_path, storage=postgres.url("away"))
    time, say = Time(), Told()
    study = open_study(recipe, tmp_path / "search", clock=time.clock(), say=say)
    study.ask()
    postgres.stop()
    try:
        with pytest.raises(SearchError, match=r"since 10 minutes .*What was told before is kept") as caught:
            study.report(0, 1, 1.0)
        assert "geheim" not in str(caught.value)
        assert GIVE_UP_S <= sum(time.slept) <= GIVE_UP_S + LONGEST_PAUSE_S
        assert time.slept[:7] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
        assert len(say.lines) == 1
        time.t += 20
        assert study.beat() == []  # which waits for nothing
        study.leave()
    finally:
        postgres.start()


@needs_postgres
@pytest.mark.slow
def test_an_account_that_may_not_make_tables(tmp_path: Path, postgres: Postgres) -> None:
    import psycopg

    url = postgres.url("closed")
    with psycopg.connect(url, autocommit=True) as server:
        server.execute("CREATE ROLE reader LOGIN PASSWORD 'geheim'")
    recipe = make_recipe(tmp_path, storage=f"postgresql://reader:geheim@127.0.0.1:{postgres.port}/closed")
    with pytest.raises(SearchError, match=r"refused what was asked of it \(permission denied .*may create and change"):
        open_study(recipe, tmp_path / "search")


@needs_postgres
@pytest.mark.slow
def test_a_database_that_does_not_exist(tmp_path: Path, postgres: Postgres) -> None:
    postgres.url("exists")
    recipe = make_recipe(tmp_path, storage=f"postgresql://postgres:geheim@127.0.0.1:{postgres.port}/missing")
    with pytest.raises(SearchError, match=r'cannot be reached .*database "missing" does not exist') as caught:
        open_study(recipe, tmp_path / "search")
    assert "geheim" not in str(caught.value)
