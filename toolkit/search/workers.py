"""Who works on a study, and how another worker tells that one is dead.

A process on the same machine is looked up; one elsewhere is dead when the number that it writes now and then (its beat)
has stood still for a minute of our own looking. No two clocks are ever compared for that.
"""

import hashlib
import math
import os
import platform
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

SILENCE_S = 60.0
LONGEST_LOOK_S = 10.0  # of a longer gap between two looks (storage down, machine asleep) no more than this counts
SAME_START_S = 1.0
_PROC = Path("/proc")


@dataclass(frozen=True)
class Worker:
    """One process that works on a study.

    host: the machine and its current boot, so that a process number means something. started: when the process began,
    in seconds of a clock that all processes of this host share. index: its place among the workers that were started
    together, 0 for the first.
    """

    name: str
    host: str
    pid: int
    started: float
    index: int

    @classmethod
    def here(cls, index: int = 0) -> "Worker":
        """This process, under a name that no other worker has, nor this process at another time."""
        pid = os.getpid()
        name = f"{platform.node() or 'here'}-{pid}-{secrets.token_hex(3)}"
        return cls(name, _host(), pid, started_at(pid) or 0.0, index)

    def facts(self) -> dict[str, Any]:
        """The worker as JSON."""
        return asdict(self)


def started_at(pid: int) -> float | None:
    """When a process of this host began; None when there is none of that number, or only what is left of it.

    NaN when there is one that may not be looked at, such as another user's.
    """
    if (_PROC / "self/stat").exists():  # Linux: ticks since boot, which no correction of the clock moves
        try:
            told = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return math.nan if psutil.pid_exists(pid) else None
        fields = told.rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X", "x") else int(fields[19]) / os.sysconf("SC_CLK_TCK")
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.AccessDenied:
        return math.nan
    except psutil.Error:
        return None


def _host() -> str:
    """The machine, its boot and, in a container, its own numbering of processes."""
    try:
        boot = _PROC.joinpath("sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        told = f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        told = f"{uuid.getnode()}"
    return f"{platform.node() or 'here'}/{hashlib.sha256(told.encode()).hexdigest()[:8]}"


class Watch:
    """Tells, from what the workers of a study write about themselves, which of them are dead."""

    def __init__(self, own: Worker, now: Callable[[], float]) -> None:
        self._own, self._now = own, now
        self._looked: float | None = None
        self._seen: dict[str, tuple[Any, float]] = {}  # name: its last beat, and for how long that has stood still

    def dead(self, told: Mapping[str, Mapping[str, Any]]) -> frozenset[str]:
        """Names of the workers that are gone. `told`: what each worker wrote last, by name."""
        now = self._now()
        gap = 0.0 if self._looked is None else min(max(now - self._looked, 0.0), LONGEST_LOOK_S)
        self._looked = now
        return frozenset(name for name, facts in told.items() if name != self._own.name and self._is_dead(facts, gap))

    def _is_dead(self, facts: Mapping[str, Any], gap: float) -> bool:
        if facts.get("left"):
            return True
        if facts["host"] == self._own.host:
            return not _is_running(int(facts["pid"]), float(facts["started"]))
        beat, still = self._seen.get(facts["name"], (None, 0.0))
        still = still + gap if beat == facts["beat"] else 0.0
        self._seen[facts["name"]] = (facts["beat"], still)
        return still >= SILENCE_S


def _is_running(pid: int, started: float) -> bool:
    found = started_at(pid)
    return found is not None and not abs(found - started) >= SAME_START_S  # NaN: nothing speaks against it
