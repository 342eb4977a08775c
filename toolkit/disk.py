"""Files that are whole or absent: written beside their place, synced, and renamed into it.

A killed process leaves the old file or the new one, never half of one.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from toolkit.errors import DiskError

COMPLETE = "COMPLETE"  # the marker of a folder that counts only when it is there; written last


def cache_folder() -> Path:
    """Where what can be computed again is kept for the next run: XDG_CACHE_HOME/maltu, or ~/.cache/maltu."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maltu"


def make_folder(path: Path) -> None:
    """Make a folder and its parents. Raises DiskError that says what stands in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as denied:
        raise DiskError(
            f"{path}: the folder cannot be made ({denied.strerror}). Check permissions and free space."
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, synced, and rename it into place. Raises DiskError on a full disk or a read-only
    folder.
    """
    write_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON (UTF-8, indented, no NaN) atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a file beside `path`, then rename it into place; on failure nothing is left and the old file
    stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        fill(beside)
        _sync(beside)
        os.replace(beside, path)
    except BaseException as failed:  # Ctrl-C too
        problem = cannot_write(path, failed) if _is_of_the_disk(failed) else failed
        remove(beside)
        raise problem from (None if problem is failed else failed)


def write_folder(path: Path, fill: Callable[[Path], object], marker: bool = False) -> None:
    """Let `fill` write a folder beside `path`, sync every file, and rename it into place; an older folder is replaced.

    With `marker` a COMPLETE file is written last and synced, with the size of every file: see `is_whole`.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        fill(beside)
        files = sorted(p for p in beside.rglob("*") if p.is_file())
        for file in files:
            _sync(file)
        if marker:
            listed = "".join(f"{file.stat().st_size} {file.relative_to(beside).as_posix()}\n" for file in files)
            (beside / COMPLETE).write_text(f"{stamp()}\n{listed}", encoding="utf-8")
            _sync(beside / COMPLETE)
        replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
        if path.exists():
            os.replace(path, replaced)
        os.replace(beside, path)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as failed:  # Ctrl-C too
        problem = cannot_write(path, failed) if _is_of_the_disk(failed) else failed
        remove(beside)
        raise problem from (None if problem is failed else failed)


def copy_folder(source: Path, target: Path) -> None:
    """A copy of a folder, there whole or not at all. Raises: DiskError."""
    write_folder(target, lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True))


def _is_of_the_disk(failed: BaseException) -> bool:
    """Whether writing failed, and not the writer: torch.save reports a full disk as a RuntimeError."""
    said = str(failed)
    is_torch = isinstance(failed, RuntimeError) and ("StreamWriter" in said or "unexpected pos" in said)
    return isinstance(failed, OSError | SafetensorError) or is_torch


def is_whole(folder: Path) -> bool:
    """Whether a folder has its marker, and every file that the marker lists in its full size."""
    try:
        lines = (folder / COMPLETE).read_text(encoding="utf-8").splitlines()[1:]
        sizes = [line.split(" ", 1) for line in lines]
        return all((folder / name).stat().st_size == int(size) for size, name in sizes)
    except (OSError, ValueError):
        return False


def sweep(folder: Path) -> None:
    """Clear away what killed processes left under a folder: half-written files go, and a folder that was moved aside
    to be replaced, and was not, comes back. What a living process of this machine is writing stays.
    """
    for left in sorted(path for path in folder.rglob(".*.replaced") if not _is_at_work(path)):
        place = left.with_name(left.name[1:].rsplit(".", 2)[0])
        with contextlib.suppress(OSError):
            left.rename(place)  # refused where the new one has come
    for left in sorted([*folder.rglob(".*.writing"), *folder.rglob(".*.replaced")]):
        if not _is_at_work(left):
            remove(left)


def _is_at_work(path: Path) -> bool:
    """Whether the process that its name tells lives: several work in one folder while a search runs."""
    number = path.name.rsplit(".", 2)[-2]
    return number.isdecimal() and int(number) != os.getpid() and psutil.pid_exists(int(number))


def remove(path: Path) -> None:
    """Remove a file or a folder that is not needed any more; what cannot be removed stays, and harms nobody."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):  # a read-only file system refuses even to remove what is not there
        path.unlink(missing_ok=True)


def cannot_write(path: Path, failed: BaseException) -> DiskError:
    """The error for a write that failed, with the space that was free: torch calls a full disk an unexpected pos."""
    try:
        free = f"{shutil.disk_usage(path.parent).free / 2**20:,.1f} MB free"
    except OSError:
        free = "free space unknown"
    return DiskError(f"{path}: cannot be written ({failed}; {free}). Check free space and permissions.")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_text(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def stamp() -> str:
    """The time now, in UTC, as ISO 8601 to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
