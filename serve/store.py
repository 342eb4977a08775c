"""Where feedback lies, and conversations where they are kept: SQLite in a file, or PostgreSQL by its URL.

What is acknowledged is on the disk: every write is one transaction, and SQLite (WAL) syncs at each. Texts stand as
JSON with everything beyond ASCII escaped, so that a database that takes no NUL character takes every text.
The layout's history is serve/migrations; a store is brought up to date when it is opened.
"""

import json
import random
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Index,
    MetaData,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    text,
)  # fmt: skip
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from toolkit.disk import make_folder
from toolkit.errors import InputError, MaltuError, Problem

FLAG = "--store"
MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 7_706_574_773  # of PostgreSQL's advisory locks, held while the layout changes
_BUSY_S = 30
_TRIES = 12
_TURN_S = 0.02  # how long one who was overtaken waits, times its tries so far, a random share of it

METADATA = MetaData()
FEEDBACK = Table(
    "feedback", METADATA,
    Column("id", String(32), primary_key=True),
    Column("created_ms", BigInteger, nullable=False),
    Column("owner", String(64), nullable=False),
    Column("conversation", String(64)),
    Column("kind", String(16), nullable=False),
    Column("subject", String(200)),
    Column("payload", Text, nullable=False),
    UniqueConstraint("owner", "kind", "subject", name="feedback_subject"),
    Index("feedback_owner", "owner", "created_ms"),
    Index("feedback_conversation", "conversation"),
)  # fmt: skip
ANSWERS = Table(
    "answers", METADATA,
    Column("id", String(64), primary_key=True),
    Column("created_ms", BigInteger, nullable=False),
    Column("owner", String(64), nullable=False),
    Column("conversation", String(64)),
    Column("payload", Text, nullable=False),
    Index("answers_owner", "owner", "created_ms"),
    Index("answers_conversation", "conversation"),
)  # fmt: skip


class StoreError(MaltuError):
    """A store that cannot be reached, read or written."""

    exit_code = 2


@dataclass(frozen=True)
class Record:
    """One piece of feedback. owner: the name of the key it came with, "" without. subject: the answers it is about,
    as far as they are known; later feedback of one kind by one owner on the same subject replaces the earlier.
    """

    kind: str
    owner: str
    payload: Mapping[str, Any]
    conversation: str | None = None
    subject: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_ms: int = field(default_factory=lambda: time.time_ns() // 10**6)


@dataclass(frozen=True)
class Kept:
    """One answer of a conversation that is kept. id: the response's, with the choice's number where it is not 0."""

    id: str
    owner: str
    conversation: str | None
    payload: Mapping[str, Any]
    created_ms: int = field(default_factory=lambda: time.time_ns() // 10**6)


@dataclass(frozen=True)
class Which:
    """Rows to read or delete: those of an owner, of a conversation, or of both. Neither: all."""

    owner: str | None = None
    conversation: str | None = None


class Store:
    """One database. For several threads at once. Every method raises StoreError when the database is out of reach."""

    def __init__(self, url: str) -> None:
        """Open it and bring its layout up to date. Raises InputError for a URL that names no database of ours."""
        self._url = _checked(url)
        self._engine = _open(self._url)
        with _telling(self.place):
            _migrate(self._engine)

    @property
    def place(self) -> str:
        """Where it is, without passwords."""
        return self._url.render_as_string(hide_password=True)

    def add(self, record: Record) -> bool:
        """Store feedback; it is on the disk when this returns. True where it replaced earlier feedback."""
        for left in reversed(range(_TRIES)):
            try:
                return self._add(record)
            except IntegrityError:  # another one on the same subject came in between
                if not left:
                    raise StoreError(f"{self.place}: others write the same feedback at once. Send it again.") from None
                time.sleep(random.random() * _TURN_S * (_TRIES - left))  # or they would meet again, in step
        raise AssertionError

    def keep(self, answers: Sequence[Kept]) -> None:
        """Keep answers of a conversation."""
        rows = [_row(answer, id=answer.id) for answer in answers]
        with _telling(self.place), self._engine.begin() as connection:
            connection.execute(insert(ANSWERS), rows)

    def feedback(self, which: Which, limit: int, after: str | None = None) -> list[Record]:
        """Feedback, oldest first; `after` is the id of the last that is known already."""
        wanted = select(FEEDBACK).where(*_where(FEEDBACK, which)).order_by(FEEDBACK.c.created_ms, FEEDBACK.c.id)
        with _telling(self.place), self._engine.connect() as connection:
            if after is not None:
                at = connection.execute(select(FEEDBACK.c.created_ms).where(FEEDBACK.c.id == after)).scalar()
                if at is None:
                    return []
                later = (FEEDBACK.c.created_ms > at) | ((FEEDBACK.c.created_ms == at) & (FEEDBACK.c.id > after))
                wanted = wanted.where(later)
            return [_record(row) for row in connection.execute(wanted.limit(limit))]

    def each(self) -> Iterator[Record]:
        """All feedback, oldest first, a few hundred in memory at a time."""
        wanted = select(FEEDBACK).order_by(FEEDBACK.c.created_ms, FEEDBACK.c.id)
        with _telling(self.place), self._engine.connect() as connection:
            for row in connection.execution_options(yield_per=500).execute(wanted):
                yield _record(row)

    def count(self, which: Which) -> tuple[int, int]:
        """How many pieces of feedback and kept answers there are."""
        with _telling(self.place), self._engine.connect() as connection:
            found = [
                connection.execute(select(func.count()).select_from(table).where(*_where(table, which))).scalar_one()
                for table in (FEEDBACK, ANSWERS)
            ]
        return found[0], found[1]

    def delete(self, which: Which, id: str | None = None) -> tuple[int, int]:
        """Delete what `which` names, of both kinds, or the one piece of feedback `id` of it; how many went."""
        tables = (FEEDBACK,) if id is not None else (FEEDBACK, ANSWERS)
        with _telling(self.place), self._engine.begin() as connection:
            gone = []
            for table in tables:
                which_one = [] if id is None else [table.c.id == id]
                gone.append(connection.execute(delete(table).where(*_where(table, which), *which_one)).rowcount)
        return gone[0], sum(gone[1:])

    def close(self) -> None:
        """Let the connections go."""
        self._engine.dispose()

    def _add(self, record: Record) -> bool:
        row = _row(record, id=record.id, kind=record.kind, subject=record.subject)
        with _telling(self.place), self._engine.begin() as connection:
            n_gone = 0
            if record.subject is not None:
                same = [FEEDBACK.c[name] == row[name] for name in ("owner", "kind", "subject")]
                n_gone = connection.execute(delete(FEEDBACK).where(*same)).rowcount
            connection.execute(insert(FEEDBACK), [row])
        return bool(n_gone)


class _telling:
    """Turns the database's errors into StoreError; a broken unique constraint stays what it is."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Raise StoreError for an error of the database."""
        if isinstance(error, SQLAlchemyError) and not isinstance(error, IntegrityError):
            why = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise StoreError(f"{self._place}: {why}. Check that it is reachable and can be written.") from error


def _checked(url: str) -> URL:
    try:
        found = make_url(url)
        backend = found.get_backend_name()
    except (ArgumentError, NoSuchModuleError):
        backend = None
    if backend == "postgresql":
        return found.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and found.database and found.database != ":memory:":
        return found
    says = "is no store of ours. Write sqlite:///FOLDER/feedback.db or postgresql://USER:PASSWORD@HOST/DATABASE."
    raise InputError(FLAG, [Problem("", says)])


def _open(url: URL) -> Engine:
    if url.get_backend_name() == "postgresql":
        try:
            return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10})
        except ModuleNotFoundError:
            says = "PostgreSQL wants psycopg: pip install 'maltu[postgresql]'."
            raise InputError(FLAG, [Problem("", says)]) from None
    make_folder(Path(str(url.database)).parent)
    engine = create_engine(url, connect_args={"timeout": _BUSY_S})

    @event.listens_for(engine, "connect")
    def settle(connection: Any, _: Any) -> None:
        _to_wal(connection)
        for pragma in ("synchronous=FULL", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}")

    return engine


def _to_wal(connection: sqlite3.Connection) -> None:
    """Have SQLite write ahead; where others are opening the same database it does not wait by itself."""
    until = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as busy:
            if "locked" not in str(busy) or time.monotonic() > until:
                raise
            time.sleep(random.random() * _TURN_S)


def _migrate(engine: Engine) -> None:
    """Bring the layout up to date, one process at a time."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        _take_turn(connection)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _take_turn(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    else:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _where(table: Table, which: Which) -> list[Any]:
    said = {"owner": which.owner, "conversation": which.conversation}
    return [table.c[name] == value for name, value in said.items() if value is not None]


def _row(thing: Record | Kept, **more: Any) -> dict[str, Any]:
    payload = json.dumps(thing.payload, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    own = {"created_ms": thing.created_ms, "owner": thing.owner, "conversation": thing.conversation}
    return own | {"payload": payload} | more


def _record(row: Row[Any]) -> Record:
    return Record(row.kind, row.owner, json.loads(row.payload), row.conversation, row.subject, row.id, row.created_ms)
