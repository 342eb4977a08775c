"""A study in one file: Optuna's journal, a line for each thing that happened, which is written whole or not at all.

A process that is killed while it writes, or a full disk, leaves half a line; the next line that is appended would grow
onto it, and every reader after that would stop there. So whoever writes looks at the end first, under the lock.
"""

import contextlib
import errno
import json
import os
import time
import uuid
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

from toolkit.disk import cannot_write, write_file

HELD_S = 15.0  # a lock that is older than this by our own clock belongs to a process that was killed
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP)  # a file system without links: a plain file is the lock
RECORD = b'{"op_code"'  # how every line begins


class Lock:
    """The lock of Optuna's journals (FILE.lock beside the file), so that its own tools wait for us and we for them.

    Unlike Optuna's, the link names the journal without its folder: a folder that was moved while the lock was left
    behind can be opened, and a killed holder is noticed, wherever the command was started from.
    """

    def __init__(self, journal: Path) -> None:
        self._file = journal.with_name(journal.name + ".lock")
        self._target = journal.name

    def acquire(self) -> bool:
        """Wait until the lock is ours."""
        seen, since, pause = None, time.monotonic(), 0.001
        while not self._take():
            held = self._holder()
            if held != seen:
                seen, since = held, time.monotonic()
            elif held is not None and time.monotonic() - since > HELD_S and held == self._holder():
                self.release()
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return True

    def release(self) -> None:
        """Give the lock back; nothing happens when somebody else took it for abandoned."""
        aside = self._file.with_name(f"{self._file.name}{uuid.uuid4()}.rename")
        with contextlib.suppress(OSError):
            os.rename(self._file, aside)
            os.unlink(aside)

    def _take(self) -> bool:
        try:
            try:
                os.symlink(self._target, self._file)
            except OSError as refused:
                if os.name != "nt" and refused.errno not in NO_LINKS:
                    raise
                os.close(os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except OSError as held:
            if held.errno == errno.EEXIST or (os.name == "nt" and held.errno == errno.EACCES):
                return False
            raise
        return True

    def _holder(self) -> tuple[int, int] | None:
        try:
            found = os.lstat(self._file)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


class Journal(BaseJournalBackend):
    """What Optuna's journal storage reads from and writes to.

    Raises DiskError when a line cannot be written; nothing of it is left then, and the next one can be written again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._lock = Lock(self._path)
        try:
            self._reader = JournalFileBackend(str(self._path))  # only reads: its own lock stays unused
        except OSError as denied:
            raise cannot_write(path, denied) from None

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The records from one number on; half a line at the end is left for later."""
        return self._reader.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write records, synced."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._locked():
            _append(self._path, lines.encode())

    def ends_well(self) -> bool:
        """Whether the last line is a record, or just being written; a reader would pass over it without a word."""
        last = self._path.read_bytes().rstrip(b"\n").rpartition(b"\n")[2]
        return not last or _record_in(last) == last

    def mend(self) -> int:
        """Leave out what is no record, wherever it stands; returns how many lines that concerned.

        A whole record that was written onto half of another one is kept.
        """
        with self._locked():
            lines = self._path.read_bytes().split(b"\n")
            torn, kept = 0, []
            for line in lines[:-1]:
                record = _record_in(line)
                torn += record != line
                kept += [record + b"\n"] if record is not None else []
            torn += bool(lines[-1])
            if torn:
                write_file(self._path, lambda file: file.write_bytes(b"".join(kept)))
        return torn

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._lock.acquire()
            try:
                yield
            finally:
                self._lock.release()
        except OSError as failed:
            raise cannot_write(self._path, failed) from None


def _append(path: Path, data: bytes) -> None:
    with path.open("rb+", buffering=0) as file:
        end = _end_of_lines(file.fileno())
        try:
            os.ftruncate(file.fileno(), end)
            os.lseek(file.fileno(), end, os.SEEK_SET)
            left = memoryview(data)
            while left:
                left = left[os.write(file.fileno(), left) :]
            os.fsync(file.fileno())
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(OSError):  # whoever writes next looks again
                os.ftruncate(file.fileno(), end)
            raise


def _end_of_lines(file: int, block: int = 4096) -> int:
    """Where the last whole line of an open file ends."""
    end = os.lseek(file, 0, os.SEEK_END)
    while end:
        start = max(0, end - block)
        os.lseek(file, start, os.SEEK_SET)
        last = os.read(file, end - start).rfind(b"\n")
        if last >= 0:
            return start + last + 1
        end = start
    return 0


def _record_in(line: bytes) -> bytes | None:
    """The line when it is a record; else the record that stands at its end, or None."""
    starts: Iterable[int] = (0, line.rfind(RECORD))
    for start in starts:
        if start >= 0 and line.startswith(RECORD, start):
            with contextlib.suppress(ValueError):
                json.loads(line[start:])
                return line[start:]
    return None
