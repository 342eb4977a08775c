"""Where a study is kept: a journal in the run folder, or a database that workers share; and what to do when it fails.

What fails for now (a database that is down, a file that is locked) is tried again for ten minutes; a full disk is a
DiskError, after which the next call may succeed; everything else is a SearchError that names the place.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from toolkit.errors import DiskError, MaltuError, SearchError
from toolkit.search.hushed import hushed
from toolkit.search.journal import Journal

T = TypeVar("T")
JOURNAL = "journal.log"
GIVE_UP_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
CONNECT_S = 10
LOCKED_S = 60  # how long sqlite itself waits for another process to finish writing
_FULL = re.compile(r"disk is full|no space left|disk full|readonly database|read-only", re.IGNORECASE)
_BROKEN = re.compile(r"no such (table|column)|malformed|not a database", re.IGNORECASE)
_RACE = re.compile(r"already exists|duplicate key|UNIQUE constraint|is locked", re.IGNORECASE)
TRIES_TO_OPEN = 8


@dataclass(frozen=True)
class Clock:
    """The time, as a study sees it: of day, since whenever, and a way to let some pass."""

    wall: Callable[[], float] = time.time
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass
class Storage:
    """An open storage. `place` says where it is, without a password."""

    optuna: BaseStorage
    place: str
    say: Callable[[str], None]
    clock: Clock
    secrets: tuple[str, ...] = ()
    journal: Journal | None = None
    engine: sqlalchemy.Engine | None = None
    _is_mended: bool = field(default=False, repr=False)

    def reach(self, what: Callable[[], T]) -> T:
        """What `what` returns; it is called again while the storage cannot be reached, so it must bear that.

        Raises DiskError when something could not be written, SearchError when the storage stays away or is damaged.
        """
        began, pause = self.clock.now(), FIRST_PAUSE_S
        while True:
            failed = self._try(what)
            if isinstance(failed, _Done):
                if pause > FIRST_PAUSE_S:
                    self.say(f"{self.place} is back.")
                return failed.value  # type: ignore[no-any-return]
            if self.clock.now() - began >= GIVE_UP_S:
                raise SearchError(
                    f"{self.place}: cannot be reached since {GIVE_UP_S / 60:.0f} minutes ({self.first_line(failed)})."
                    " What was told before is kept. Start it, then run the same command again; it goes on."
                )
            if pause == FIRST_PAUSE_S:
                told = self.first_line(failed)
                self.say(f"{self.place} cannot be reached ({told}). Trying again for {GIVE_UP_S / 60:.0f} minutes.")
            self.clock.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def reach_now(self, what: Callable[[], T]) -> T | None:
        """What `what` returns, or None when the storage cannot be reached or written just now."""
        try:
            failed = self._try(what)
        except DiskError:
            return None
        return failed.value if isinstance(failed, _Done) else None

    def _try(self, what: Callable[[], Any]) -> "_Done | BaseException":
        """The result, or the failure of a storage that may come back."""
        try:
            with hushed():
                return _Done(what())
        except json.JSONDecodeError as torn:
            if self.journal is None or self._is_mended:
                raise SearchError(f"{self.place}: cannot be read ({torn}). Restore it from a copy.") from None
            self._is_mended = True
            self.say_mended(self.journal.mend())
            return self._try(what)
        except (StorageInternalError, SQLAlchemyError) as failed:
            cause = _cause(failed)
            problem = self.problem(cause)
            if problem is not None:
                raise problem from None
            return cause

    def problem(self, failed: BaseException) -> MaltuError | None:
        """The error for a failure that waiting does not heal; None for one that it may."""
        told = self.first_line(failed)
        if _FULL.search(told):
            return DiskError(f"{self.place}: cannot be written ({told}). Check free space and permissions.")
        is_of_the_way = isinstance(failed, OperationalError | InterfaceError | sqlalchemy.exc.TimeoutError)
        is_gone = isinstance(failed, DBAPIError) and failed.connection_invalidated
        if (is_of_the_way or is_gone) and not _BROKEN.search(told):
            return None
        return SearchError(
            f"{self.place}: refused what was asked of it ({told}). Check that the account may create and change"
            " tables there, or name another search.storage."
        )

    def first_line(self, failed: BaseException) -> str:
        """What a failure says, in one line and without a password."""
        told = str(getattr(failed, "orig", None) or failed).strip() or type(failed).__name__
        line = " ".join(told.splitlines()[0].split())[:300].rstrip(".")
        for secret in self.secrets:
            line = line.replace(secret, "***")
        return line

    def say_mended(self, n_lines: int) -> None:
        """Tell that a journal was repaired."""
        if n_lines:
            self.say(f"{self.place}: {n_lines} torn line{'s' * (n_lines != 1)} left out; the rest is whole.")

    def close(self) -> None:
        """Give connections back."""
        if self.engine is not None:
            with hushed(), contextlib.suppress(SQLAlchemyError):
                self.engine.dispose()


@dataclass(frozen=True)
class _Done:
    value: Any


def _cause(failed: BaseException) -> BaseException:
    cause = failed.__cause__
    return cause if isinstance(failed, StorageInternalError) and cause is not None else failed


def open_storage(url: str | None, folder: Path, say: Callable[[str], None], clock: Clock) -> Storage:
    """The storage of a study: a URL's, or the journal in `folder` where there is none.

    Raises SearchError when it cannot be reached or read, DiskError when it cannot be written. Nothing is tried again,
    except what another worker does at the same moment.
    """
    return _open_journal(folder / JOURNAL, say, clock) if url is None else _open_database(url, say, clock)


def _open_journal(path: Path, say: Callable[[str], None], clock: Clock) -> Storage:
    backend = Journal(path)
    with hushed():
        try:
            n_lines = 0 if backend.ends_well() else backend.mend()
            try:
                opened = JournalStorage(backend)
            except ValueError:
                n_lines += backend.mend()
                opened = JournalStorage(backend)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, OSError) as broken:
            raise _unreadable(path, broken) from None
    storage = Storage(opened, str(path), say, clock, journal=backend)
    storage.say_mended(n_lines)
    return storage


def _unreadable(path: Path, broken: BaseException) -> SearchError:
    return SearchError(
        f"{path}: cannot be read as the journal of a study ({broken}). Restore it from a copy, or start anew with"
        " --fresh."
    )


def _open_database(url: str, say: Callable[[str], None], clock: Clock) -> Storage:
    parsed = sqlalchemy.make_url(url)
    is_file = parsed.get_backend_name() == "sqlite"
    if not is_file:
        parsed = parsed.set(drivername="postgresql+psycopg")
    place = f"{parsed.database}" if is_file else _address(parsed)
    secrets = (parsed.password, parsed.render_as_string(hide_password=False), url, parsed.query.get("password"))
    told = tuple(str(secret) for secret in secrets if secret)
    blank = Storage(optuna.storages.InMemoryStorage(), place, say, clock, secrets=told)
    arguments = {"timeout": LOCKED_S} if is_file else _patience(parsed)
    options = {"connect_args": arguments, "pool_pre_ping": True, "hide_parameters": True}
    for tries in range(1, TRIES_TO_OPEN + 1):
        try:
            with hushed():
                database = _Database(parsed.render_as_string(hide_password=False), options)
                opened = get_storage(database)
            return Storage(opened, place, say, clock, told, engine=database.engine)
        except (SQLAlchemyError, StorageInternalError) as failed:
            cause = _cause(failed)
            if tries < TRIES_TO_OPEN and _RACE.search(str(cause)):  # two workers make the tables at once
                clock.sleep(0.05 * 2**tries)
                continue
            raise _closed(blank, cause, is_file) from None
        except RuntimeError as other:  # tables of another version of Optuna
            raise SearchError(
                f"{place}: {blank.first_line(other)}. Upgrade it with `optuna storage upgrade --storage URL`, or name"
                " another search.storage."
            ) from None
    raise AssertionError("the last try returns or raises")


class _Database(RDBStorage):
    """Optuna's storage, which leaves no connection behind when it cannot be opened."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        try:
            super().__init__(url, engine_kwargs=options)
        except BaseException:
            if hasattr(self, "engine"):
                self.engine.dispose()
            raise


def _closed(blank: Storage, failed: BaseException, is_file: bool) -> MaltuError:
    problem = blank.problem(failed)
    if problem is not None:
        return problem
    told = blank.first_line(failed)
    if is_file:
        return SearchError(
            f"{blank.place}: cannot be opened as search.storage ({told}). Check that its folder exists and may be"
            " written; the path is relative to the working directory, sqlite:////FOLDER/FILE is absolute."
        )
    return SearchError(
        f"{blank.place}: cannot be reached as search.storage ({told}). Start the server, or check host, port, user and"
        " password; search.storage=null keeps the study in the run folder."
    )


def _address(url: sqlalchemy.URL) -> str:
    host = url.host or url.query.get("host") or "the local PostgreSQL"
    return f"{host}{f':{url.port}' if url.port else ''}/{url.database}"


def _patience(url: sqlalchemy.URL) -> dict[str, Any]:
    """Connection settings that notice a server that is gone; what the URL says comes first."""
    settings = {"connect_timeout": CONNECT_S, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
    return {name: value for name, value in settings.items() if name not in url.query}
