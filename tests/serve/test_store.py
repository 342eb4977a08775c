"""The store: what is acknowledged is there, on SQLite and on a real PostgreSQL."""

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, make_url

from serve.store import METADATA, Kept, Record, Store, StoreError, Which
from tests.search_world import Postgres, running_postgres, why_no_postgres
from toolkit.errors import InputError

TALK = "conversation-0001"
Opens = Callable[[], Store]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    if why := why_no_postgres():
        pytest.skip(why)
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for a new store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/말투/feedback.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.url(f"store_{abs(hash(request.node.name)) % 10**9}")


@pytest.fixture
def opens(url: str) -> Iterator[Opens]:
    """Opens the place, as often as asked."""
    opened: list[Store] = []

    def open_it() -> Store:
        opened.append(Store(url))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


def thumb(owner: str = "", **more: object) -> Record:
    return Record("thumb", owner, {"messages": [], "answers": [{"content": "김치찌개.\u0000"}], "value": "up"}, **more)  # type: ignore[arg-type]


def test_what_was_stored_is_there_after_opening_again(opens: Opens) -> None:
    record = thumb("app", conversation=TALK, subject="chatcmpl-1-0")
    assert not opens().add(record)
    assert list(opens().each()) == [record]


def test_later_feedback_on_the_same_answer_replaces_the_earlier(opens: Opens) -> None:
    store = opens()
    first, second = thumb("app", subject="a"), thumb("app", subject="a")
    assert (store.add(first), store.add(second)) == (False, True)
    assert [record.id for record in store.each()] == [second.id]
    assert not store.add(thumb("other", subject="a")) and not store.add(thumb("app", subject="b"))
    assert not store.add(thumb("app")) and not store.add(thumb("app"))
    assert store.count(Which("app")) == (4, 0)


def test_the_same_feedback_from_many_threads_is_stored_once(opens: Opens) -> None:
    store = opens()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(store.add, [thumb("app", subject="one") for _ in range(8)]))
        list(pool.map(store.add, [thumb("app") for _ in range(40)]))
    assert store.count(Which()) == (41, 0)


def test_pages_come_oldest_first_and_miss_nothing(opens: Opens) -> None:
    store = opens()
    records = [thumb("app", created_ms=1000 + n // 3) for n in range(10)]
    for record in records:
        store.add(record)
    store.add(thumb("other"))
    first = store.feedback(Which("app"), 4)
    rest = store.feedback(Which("app"), 100, after=first[-1].id)
    assert sorted(record.id for record in [*first, *rest]) == sorted(record.id for record in records)
    assert [record.created_ms for record in [*first, *rest]] == [1000 + n // 3 for n in range(10)]
    assert store.feedback(Which("app"), 4, after="0" * 32) == []


def test_deleting_takes_what_is_named_and_no_more(opens: Opens) -> None:
    store = opens()
    for owner in ("app", "other"):
        for conversation in (TALK, None):
            store.add(thumb(owner, conversation=conversation))
            name = f"{owner}-{conversation}"
            store.keep([Kept(name, owner, conversation, {"content": "안녕"}), Kept(f"{name}-1", owner, None, {})])
    assert store.delete(Which("app", TALK)) == (1, 1)
    assert store.delete(Which(conversation=TALK)) == (1, 1)
    one = store.feedback(Which("app"), 1)[0]
    assert store.delete(Which("other"), one.id) == (0, 0) and store.delete(Which("app"), one.id) == (1, 0)
    assert store.delete(Which("other")) == (1, 3) and store.count(Which()) == (0, 3)


def test_the_layout_is_what_the_migrations_lead_to(opens: Opens, url: str) -> None:
    opens()
    found = make_url(url)
    engine = create_engine(found.set(drivername="postgresql+psycopg") if "postgresql" in url else found)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    engine.dispose()


def test_many_servers_may_open_a_new_store_at_once(opens: Opens) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: opens(), range(4)))
    for store in stores:
        store.add(thumb())
    assert stores[0].count(Which()) == (4, 0)


def test_sqlite_syncs_at_every_write_so_that_a_power_cut_loses_nothing(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    with store._engine.connect() as connection:
        asked = ("journal_mode", "synchronous", "secure_delete")
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in asked]
    store.close()
    assert found == ["wal", 2, 1]


@pytest.mark.slow
def test_a_database_that_goes_away_is_told_without_its_password(postgres: Postgres) -> None:
    store = Store(postgres.url("gone"))
    postgres.stop()
    try:
        with pytest.raises(StoreError, match="Check that it is reachable") as raised:
            store.add(thumb())
        assert "geheim" not in str(raised.value) and "geheim" not in store.place
    finally:
        postgres.start()
    assert not store.add(thumb())
    store.close()


@pytest.mark.parametrize("url", ["mysql://h/d", "feedback.db", "sqlite://", "sqlite:///:memory:", ""])
def test_a_url_that_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="no store of ours"):
        Store(url)


def test_a_store_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "feedback.db").write_bytes(b"no database " * 1000)
    with pytest.raises(StoreError, match="not a database"):
        Store(f"sqlite:///{tmp_path}/feedback.db")


def test_a_new_store_that_somebody_holds_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    import sqlite3

    holder = sqlite3.connect(tmp_path / "feedback.db", isolation_level=None, check_same_thread=False)
    holder.execute("CREATE TABLE held (x)")
    holder.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.5, lambda: holder.execute("COMMIT")).start()
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    store.add(thumb())
    assert store.count(Which()) == (1, 0)
    store.close()
    holder.close()
