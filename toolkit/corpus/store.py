"""Talks in order, in memory while they are few and in a file when they are many; read either way like a list.

The file is a temporary one without a name: it vanishes with the last view of it, and when the process is killed.
"""

import errno
import json
import os
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, overload

import numpy as np
import numpy.typing as npt

from toolkit.corpus.talk import Talk, Turn

Rows = npt.NDArray[np.int64]

MEMORY_MB = 64
_TALK_BYTES, _TURN_BYTES = 300, 150  # what Python's objects cost beside the characters, about


class _TalkFile(Sequence[Talk]):
    """Talks in a temporary file, one after the other; several threads and forked processes may read at once."""

    def __init__(self, folder: Path | None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, prefix="talks-", buffering=0)
        self._starts, self._lock = array("Q", [0]), threading.Lock()
        weakref.finalize(self, self._file.close)

    def append(self, talk: Talk) -> None:
        line = _encode(talk)
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Talk: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Talk]: ...
    def __getitem__(self, index: int | slice) -> Talk | Sequence[Talk]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        start, end = self._starts[index], self._starts[index + 1]
        return _decode(self._read(start, end - start))

    def _read(self, start: int, n_bytes: int) -> bytes:
        if hasattr(os, "pread"):  # leaves the file's position alone, which a forked process shares
            return os.pread(self._file.fileno(), n_bytes, start)
        with self._lock:
            self._file.seek(start)
            return self._file.read(n_bytes)


class Talks(Sequence[Talk]):
    """A view of stored talks, in the order of its rows. Slices and selections are views too and cost 8 bytes a talk."""

    def __init__(self, stored: Sequence[Talk], rows: Rows | None = None) -> None:
        self._stored = stored
        self._rows: Rows = np.arange(len(stored), dtype=np.int64) if rows is None else rows

    def __len__(self) -> int:
        """The number of talks."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Talk: ...
    @overload
    def __getitem__(self, index: slice) -> "Talks": ...
    def __getitem__(self, index: int | slice) -> "Talk | Talks":
        """One talk, or a view of several."""
        if isinstance(index, slice):
            return Talks(self._stored, self._rows[index])
        return self._stored[int(self._rows[index])]

    def __iter__(self) -> Iterator[Talk]:
        """The talks in order."""
        return (self._stored[row] for row in self._rows.tolist())

    def select(self, places: npt.ArrayLike) -> "Talks":
        """The talks at these places (or where a mask is true), as a view."""
        return Talks(self._stored, self._rows[np.asarray(places)])

    @property
    def is_in_file(self) -> bool:
        """Whether the talks lie in a file rather than in memory."""
        return isinstance(self._stored, _TalkFile)


class Spool:
    """Takes talks one by one and gives them back as Talks; in a file once they take more than about `memory_mb`.

    The file lies in `workdir` (None: the system's own place for temporary files).
    """

    def __init__(self, workdir: Path | None, memory_mb: float = MEMORY_MB) -> None:
        self._workdir, self._room = workdir, int(memory_mb * 1_000_000)
        self._talks: list[Talk] = []
        self._file: _TalkFile | None = None

    def add(self, talk: Talk) -> None:
        """Append a talk. Raises: OSError where the file cannot be written."""
        if self._file is not None:
            self._file.append(talk)
            return
        self._talks.append(talk)
        self._room -= _TALK_BYTES + sum(_TURN_BYTES + 2 * len(turn.content) for turn in talk.turns)
        if self._room < 0:
            self._file = _TalkFile(self._workdir)
            for held in self._talks:
                self._file.append(held)
            self._talks = []

    def finish(self) -> Talks:
        """All talks in the order they came. The spool takes none afterwards."""
        return Talks(self._talks if self._file is None else self._file)


def _encode(talk: Talk) -> bytes:
    turns = [part for turn in talk.turns for part in (turn.role, turn.content)]
    return json.dumps([talk.source, talk.label, talk.lang, turns], ensure_ascii=False).encode()


def _decode(line: bytes) -> Talk:
    source, label, lang, turns = json.loads(line)
    return Talk(tuple(map(Turn, turns[::2], turns[1::2])), source, label, lang)
