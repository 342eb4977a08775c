"""A disk that fills up, a folder that becomes read-only: told in one clear error, and no step of training is lost."""

import errno
import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from toolkit import bundle, disk
from toolkit.fit import watch
from toolkit.loaded import load_run

pytestmark = pytest.mark.slow


Command = Callable[..., Any]
Same = Callable[[Path], None]
Logged = Callable[[Path], list[tuple[int, float]]]


@pytest.fixture(autouse=True)
def _save_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(watch, "SAVE_SHARE", 0.0)


class Room:
    """Where runs lie; from `spoil` on nothing more can be written there, until `mend`."""

    def __init__(self, runs: Path, spoil: Callable[[], object], mend: Callable[[], object], reason: str) -> None:
        self.runs, self.spoil, self.mend, self.reason = runs, spoil, mend, reason


def mount(*arguments: str) -> None:
    """Mount something, or skip with the reason: only root may."""
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as refused:
        pytest.skip(f"nothing can be mounted here: {getattr(refused, 'stderr', '') or refused}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Room]:
    """A tmpfs of 16 MB, and a file that fills it."""
    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place))

    def fill() -> None:
        with (place / "filler").open("wb", buffering=0) as file:
            for size in (65536, 4096):
                try:
                    while file.write(b"0" * size):
                        pass
                except OSError as full:
                    assert full.errno == errno.ENOSPC

    yield Room(place / "runs", fill, (place / "filler").unlink, "No space left on device|0.0 MB free")
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Room]:
    """A folder that is mounted over itself, read-only."""
    place = tmp_path / "disk"
    (place / "runs").mkdir(parents=True)
    mounted: list[bool] = []

    def lock() -> None:
        mount("--bind", str(place), str(place))
        mounted.append(True)
        mount("-o", "remount,bind,ro", str(place))

    def unlock() -> None:
        while mounted and mounted.pop():
            subprocess.run(["umount", "-l", str(place)], check=True)

    yield Room(place / "runs", lock, unlock, "Read-only file system")
    unlock()


@pytest.fixture
def no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Room:
    """As a full disk, for users who may not mount one: no byte reaches the disk."""
    sync = disk._sync

    def refuse(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return Room(
        tmp_path / "runs",
        lambda: monkeypatch.setattr(disk, "_sync", refuse),
        lambda: monkeypatch.setattr(disk, "_sync", sync),
        "No space left on device",
    )


@pytest.fixture
def room(request: pytest.FixtureRequest) -> Room:
    found: Room = request.getfixturevalue(request.param)
    return found


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "first_file": lambda path: path.name == "recipe.yaml",
    "checkpoint": lambda path: path.name == "step-00000005",
    "best": lambda path: path.name == "best-00000005",
    "adapter": lambda path: path.name == "main",
    "run.json": lambda path: path.name == "run.json" and (path.parent / "adapters" / "main").is_dir(),
}


def spoil_when(monkeypatch: pytest.MonkeyPatch, room: Room, is_time: Callable[[Path], bool]) -> None:
    """Spoil the room just before the first file or folder is written of which `is_time` is true."""
    done: list[Path] = []

    def spoiling(write: Callable[..., None], path: Path, *more: Any, **others: Any) -> None:
        if not done and is_time(path):
            done.append(path)
            room.spoil()
        write(path, *more, **others)

    for write in (disk.write_file, disk.write_folder):
        monkeypatch.setattr(disk, write.__name__, functools.partial(spoiling, write))


@pytest.mark.parametrize(
    ("room", "moment"),
    [
        *(("small_disk", moment) for moment in ("first_file", "checkpoint", "adapter", "run.json")),
        *(("no_space", moment) for moment in ("checkpoint", "best", "adapter", "run.json")),
        *(("read_only", moment) for moment in ("checkpoint", "run.json")),
    ],
    indirect=["room"],
)
def test_a_disk_that_takes_no_more_is_told_and_costs_no_step(
    command: Command, monkeypatch: pytest.MonkeyPatch, assert_same: Same, logged: Logged, room: Room, moment: str
) -> None:
    spoil_when(monkeypatch, room, MOMENTS[moment])
    run = room.runs / "tiny"
    said = command("--runs", str(room.runs))
    said.refuses(str(run), "cannot be written", "Check free space and permissions", code=1)
    assert any(reason in said.err for reason in room.reason.split("|")), said.err
    room.mend()
    assert not [path for path in run.rglob("*") if path.name.endswith(".writing")]
    last = bundle.Run(run).last_checkpoint()
    if moment in ("checkpoint", "best"):
        assert last is not None and last.name == "step-00000004"
    assert len(logged(run)) == {"first_file": 0, "checkpoint": 5, "best": 4}.get(moment, 12)
    assert command("--runs", str(room.runs)).code == 0
    assert_same(run)
    assert load_run(run).facts["status"] == "finished"


@pytest.mark.parametrize("room", ["small_disk", "read_only"], indirect=True)
def test_a_disk_that_takes_nothing_from_the_start_is_told(command: Command, room: Room) -> None:
    room.spoil()
    command("--runs", str(room.runs)).refuses(str(room.runs / "tiny"), "cannot be", "Check", code=1)
    room.mend()
    assert command("--runs", str(room.runs), "train.max_steps=1").code == 0
