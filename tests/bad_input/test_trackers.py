"""Trackers without a key, without a disk, killed or frozen in the middle: the run says so once and goes on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from toolkit.track import read_metrics

ROOT = Path(__file__).parents[2]
MIDDLE = """
import os, signal, sys, time
from pathlib import Path
import psutil
from toolkit.track import open_track

run, harm = Path(sys.argv[1]), sys.argv[2]
said = []
track = open_track(run, ("wandb",), {"이름": "말투"}, 0, said.append)
assert not said, said
track.log(1, loss=2.0)
time.sleep(1.0)
helpers = [one for one in psutil.Process().children(recursive=True) if "wandb" in " ".join(one.cmdline())]
assert helpers, "wandb works without a process of its own: this test harms nothing"
for one in helpers:
    one.send_signal(getattr(signal, harm))
started = time.monotonic()
for step in range(2, 52):
    track.log(step, loss=1.0)
track.text(52, "samples", "안녕")
steps = time.monotonic() - started
track.close()
print("steps", round(steps, 2), "closing", round(time.monotonic() - started - steps, 2), "said", said)
for one in helpers:
    if one.is_running():
        one.kill()
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """This environment without wandb's own, at home in a folder of the test."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_"))}
    return {**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "HF_HOME": str(home / "hf"), **more}


def script(text: str, *arguments: str, home: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run Python with nobody at the keyboard; a minute and a half to end."""
    command = [sys.executable, "-c", text, *arguments]
    told = environment(home, **more)
    return subprocess.run(
        command, env=told, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "말투"
    folder.mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["SIGKILL", "SIGSTOP"])
def test_wandb_killed_or_frozen_in_the_middle_loses_no_step(run: Path, harm: str) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    done = script(MIDDLE, str(run), harm, home=run.parent, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(run)) == 51
    assert done.stdout.startswith("steps")


@pytest.mark.slow
def test_wandb_without_a_key_writes_offline_and_asks_nobody(run: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    text = """
import sys
from pathlib import Path
from toolkit.track import open_track
said = []
track = open_track(Path(sys.argv[1]), ("wandb",), {}, 0, said.append)
track.log(1, loss=2.0)
track.close()
assert not said, said
"""
    done = script(text, str(run), home=run.parent)
    assert done.returncode == 0, done.stderr
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.slow
def test_wandb_with_a_key_and_no_network_does_not_hold_up_the_run(run: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    text = """
import sys, time
from pathlib import Path
from toolkit.track import open_track
started = time.monotonic()
said = []
track = open_track(Path(sys.argv[1]), ("wandb",), {}, 0, said.append)
for step in range(1, 11):
    track.log(step, loss=2.0)
track.close()
print(round(time.monotonic() - started, 1), said)
"""
    told = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = script(text, str(run), home=run.parent, **told)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(run)) == 10
    assert "wandb did not start" in done.stdout or "wandb failed" in done.stdout


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 KB with nothing free, or a skip: only root may mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    with (place / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"0" * 4096):
                pass
        except OSError:
            pass
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_without_a_disk_is_named_and_the_run_goes_on(run: Path, full_disk: Path, name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    (run / name).symlink_to(full_disk)
    text = """
import sys
from pathlib import Path
from toolkit.track import open_track
said = []
track = open_track(Path(sys.argv[1]), (sys.argv[2],), {"이름": "말투"}, 0, said.append)
for step in range(1, 201):
    track.log(step, loss=2.0)
    track.text(step, "samples", "안녕 " * 100)
track.close()
print(said)
"""
    more = {"WANDB_MODE": "offline", "HF_HOME": str(full_disk)} if name == "trackio" else {"WANDB_MODE": "offline"}
    done = script(text, str(run), name, home=run.parent, **more)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(run)) == 200
    if name == "tensorboard":  # wandb keeps to itself what it cannot write, and trackio warns in its own words
        assert "track: tensorboard failed" in done.stdout or "track: tensorboard did not start" in done.stdout
