"""The run folder: read, write, lock, version; all that serving ever sees of training.

Every file is written beside its place and renamed into it, so that a killed run leaves the old file or the new one.
A folder is known to be a run by its run.json; `version` there says which layout it has. Nothing here loads a model.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from toolkit.disk import is_whole, make_folder, remove, stamp, sweep, write_json
from toolkit.errors import BusyError, RunError

VERSION = 1
RUN_FILE = "run.json"
LOCK_FILE = ".lock"
LEARNED_FILE = "learned.json"  # marks of the talk that the run learned, so that nothing of it judges another run
BEFORE_FILE = "before.json"  # under checkpoints/: what the bare base does, measured once a run
BEGUN = frozenset(
    {"recipe.yaml", "template.jinja", "generation.json", "checkpoints", "search"}
)  # written before run.json


class Run:
    """One run folder. Paths are computed, never stored, so that a moved or copied folder still works."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.path.name or self.path.resolve().name

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        """Where an unfinished run keeps what it needs to go on."""
        return self.path / "checkpoints"

    def adapter(self, name: str = "main") -> Path:
        """The folder of one adapter; `model/` holds the weights where every parameter was trained."""
        return self.path / "adapters" / name

    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are there, sorted."""
        folder = self.path / "adapters"
        return (
            tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."))
            if folder.is_dir()
            else ()
        )

    def facts(self) -> dict[str, Any]:
        """run.json, whole. Raises RunError when it is missing, damaged or of a layout this version does not read."""
        file = self.path / RUN_FILE
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(
                f"{self.path}: not a run folder (no {RUN_FILE}). Name a folder that training wrote."
            ) from None
        except (OSError, ValueError) as broken:
            raise RunError(
                f"{file}: cannot be read ({broken}). Restore it from a copy, or train again with --fresh."
            ) from broken
        if not isinstance(facts, dict) or facts.get("version") != VERSION:
            found = facts.get("version") if isinstance(facts, dict) else None
            raise RunError(f"{file}: layout version {found!r}; this version of Maltu reads {VERSION}. Update Maltu.")
        return facts

    def finished(self, *parts: str) -> dict[str, Any]:
        """run.json of a run whose training is over, with the maps named in `parts`. Raises RunError otherwise."""
        facts = self.facts()
        if facts.get("status") != "finished":
            raise RunError(
                f"{self.path}: training is not finished ({facts.get('status')}). Run its command again; it goes on."
            )
        lacking = [part for part in parts if not isinstance(facts.get(part), dict)]
        if lacking:
            raise RunError(
                f"{self.path / RUN_FILE}: damaged, it lacks {', '.join(lacking)}. Restore it from a copy, or train"
                " again with --fresh."
            )
        return facts

    def update(self, **changes: Any) -> dict[str, Any]:
        """Write changed facts into run.json; what is not named stays."""
        facts = {
            "version": VERSION,
            "name": self.name,
            **(self.facts() if (self.path / RUN_FILE).exists() else {}),
            **changes,
        }
        facts["updated"] = stamp()
        write_json(self.path / RUN_FILE, facts)
        return facts

    def refuse_foreign(self) -> None:
        """Raise RunError when the folder is there, is no run, and holds files that no run would have left."""
        if not self.path.is_dir() or (self.path / RUN_FILE).exists():
            return
        left = {path.name for path in self.path.iterdir() if not path.name.startswith(".")}
        inside = {path.name for path in self.checkpoints.iterdir()} if self.checkpoints.is_dir() else set()
        foreign = sorted((left - BEGUN) | (inside - {BEFORE_FILE}))
        if foreign:
            raise RunError(
                f"{self.path}: is there already and is no run ({foreign[0]}). Train with another name=…, or --runs."
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; a second process is refused at once with RunError."""
        make_folder(self.path)
        try:
            file = (self.path / LOCK_FILE).open("a+", encoding="utf-8")
        except OSError as denied:
            raise RunError(
                f"{self.path}: cannot be written ({denied.strerror}). Check its permissions, or name=… another run."
            ) from None
        with file:
            _take_lock(file, self.path)
            sweep(self.path)
            yield

    def is_free(self) -> bool:
        """Whether no process holds the folder at this moment."""
        try:
            with (self.path / LOCK_FILE).open("a+", encoding="utf-8") as file:
                _take_lock(file, self.path)
        except BusyError:
            return False
        return True

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; torn and damaged ones do not count."""
        found = sorted(self.checkpoints.glob("step-*")) if self.checkpoints.is_dir() else []
        whole = [p for p in found if is_whole(p)]
        return whole[-1] if whole else None


def _take_lock(file: IO[str], path: Path) -> None:
    try:
        if os.name == "nt":
            import msvcrt

            getattr(msvcrt, "locking")(file.fileno(), getattr(msvcrt, "LK_NBLCK"), 1)  # noqa: B009
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise BusyError(
            f"{path}: another process is working on this run ({file.read().strip() or 'unknown'})."
            " Wait for it, or name=… another run."
        ) from None
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, it only cannot say who has it
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"pid {os.getpid()}, since {stamp()}".encode())


def open_run(path: Path | str) -> Run:
    """A finished or unfinished run that exists. Raises RunError when the folder is no run."""
    run = Run(Path(path))
    run.facts()
    return run


def set_aside(run: Run) -> Path:
    """Move a run folder to runs/.old/NAME-TIME, never deleting anything; returns where it lies now."""
    old = run.path.parent / ".old" / f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}"
    make_folder(old.parent)
    try:
        os.replace(run.path, old)
    except OSError as denied:
        raise RunError(
            f"{run.path}: cannot be moved to {old} ({denied.strerror}). Check permissions, or name=… another run."
        ) from None
    return old


def drop_checkpoints(run: Run, keep: Sequence[int]) -> None:
    """Drop what only an unfinished run needs; checkpoints of the steps in `keep` stay."""
    kept = {f"step-{step:08d}" for step in keep}
    for path in run.checkpoints.iterdir() if run.checkpoints.is_dir() else ():
        if path.name not in kept:
            remove(path)
    if run.checkpoints.is_dir() and not any(run.checkpoints.iterdir()):
        remove(run.checkpoints)
