"""The run folder: written whole or not at all, locked, movable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit import bundle, disk
from toolkit.errors import RunError


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    disk.write_text(target, "old")

    def fill(beside: Path) -> None:
        beside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="free space"):
        disk.write_file(target, fill)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_failed_folder_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "adapters"
    disk.write_folder(target, lambda f: (f / "a").write_text("old"))

    def fill(beside: Path) -> None:
        (beside / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="free space"):
        disk.write_folder(target, fill)
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["adapters"]


def test_a_checkpoint_without_its_marker_does_not_count(tmp_path: Path) -> None:
    run = bundle.Run(tmp_path)
    disk.write_folder(run.checkpoints / "step-00000003", lambda f: (f / "x").write_text("1"), marker=True)
    disk.write_folder(run.checkpoints / "step-00000009", lambda f: (f / "x").write_text("1"))
    last = run.last_checkpoint()
    assert last is not None and last.name == "step-00000003"


def test_a_second_process_is_refused_while_the_first_holds_the_lock(tmp_path: Path) -> None:
    code = "import sys, pathlib, toolkit.bundle as b\nwith b.Run(pathlib.Path(sys.argv[1])).locked(): pass"
    with bundle.Run(tmp_path).locked():
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and f"pid {os.getpid()}" in done.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        bundle.open_run(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 99}', "\xff"])
def test_a_damaged_run_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match=r"run\.json"):
        bundle.open_run(tmp_path)


def test_setting_aside_keeps_every_file(tmp_path: Path) -> None:
    run = bundle.Run(tmp_path / "말투")
    run.path.mkdir()
    run.update(status="finished")
    old = bundle.set_aside(run)
    assert not run.path.exists() and bundle.Run(old).facts()["status"] == "finished"


def test_facts_survive_a_move(tmp_path: Path) -> None:
    run = bundle.Run(tmp_path / "a")
    run.path.mkdir()
    run.update(status="finished")
    (tmp_path / "a").rename(tmp_path / "b")
    assert bundle.open_run(tmp_path / "b").facts()["status"] == "finished"
