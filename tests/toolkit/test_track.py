"""Numbers reach the file always, and no tracker can stop a run."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from toolkit.track import WANDB_ID, Track, open_track, read_metrics


class Broken:
    def log(self, step: int, values: Mapping[str, float]) -> None:
        raise ConnectionError("no network")

    def text(self, step: int, name: str, text: str) -> None:
        raise ConnectionError("no network")

    def close(self) -> None:
        raise ConnectionError("no network")


def test_a_tracker_that_fails_is_named_once_and_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    track = Track(tmp_path / "metrics.jsonl", {"broken": Broken()}, said.append)
    for step in (1, 2, 3):
        track.log(step, loss=1.0)
    track.close()
    assert len(said) == 1 and "broken" in said[0]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_steps_after_the_checkpoint_are_dropped_when_a_run_goes_on(tmp_path: Path) -> None:
    track = open_track(tmp_path, (), {}, 0, lambda _: None)
    for step in (1, 2, 3):
        track.log(step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    open_track(tmp_path, (), {}, 2, lambda _: None)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track = open_track(tmp_path, ("tensorboard",), {}, 0, lambda _: None)
    track.log(1, loss=2.5)
    track.text(1, "samples", "안녕")
    track.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [scalar.value for scalar in events.Scalars("loss")] == [2.5]


def test_a_tracker_that_is_not_installed_is_named_and_the_run_goes_on(tmp_path: Path, monkeypatch: object) -> None:
    import sys

    said: list[str] = []
    sys.modules["trackio"] = None  # type: ignore[assignment]
    try:
        open_track(tmp_path, ("trackio",), {}, 0, said.append).log(1, loss=1.0)
    finally:
        del sys.modules["trackio"]
    assert "trackio did not start" in said[0]


def test_a_tracker_that_does_not_end_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Broken):
        def close(self) -> None:
            threading.Event().wait(60)

    monkeypatch.setattr("toolkit.track.END_SECONDS", 0.05)
    said: list[str] = []
    started = time.monotonic()
    Track(tmp_path / "metrics.jsonl", {"endless": Endless()}, said.append).close()
    assert time.monotonic() - started < 5
    assert len(said) == 1 and "did not end within 0.05 s" in said[0]


SCRIPT = """
import sys
from pathlib import Path
from toolkit.track import open_track

run, name, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
said = []
track = open_track(run, (name,), {"이름": "tiny"}, step, said.append)
track.log(step + 1, loss=2.5)
track.text(step + 1, "samples", "안녕")
track.close()
assert not said, said
"""


def log_with(name: str, run: Path, step: int) -> None:
    """Log two steps in a process of its own, which has a minute to end; caches, settings and keys lie beside `run`."""
    own = {"HOME": run.parent, "XDG_CACHE_HOME": run.parent / "cache", "HF_HOME": run.parent / "hf"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_"))}
    environment |= {key: str(value) for key, value in own.items()} | {"WANDB_MODE": "offline"}
    command = [sys.executable, "-c", SCRIPT, str(run), name, str(step)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_wandb_writes_offline_into_the_run_and_goes_on_in_the_same_wandb_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    run = tmp_path / "말투"
    run.mkdir()
    log_with("wandb", run, 0)
    time.sleep(1.1)  # wandb names the folder of each start by its second
    log_with("wandb", run, 1)
    own_id = (run / WANDB_ID).read_text()
    files = sorted(file for file in run.glob("wandb/offline-run-*/run-*.wandb") if file.stat().st_size)
    assert [file.name for file in files] == [f"run-{own_id}.wandb"] * 2
    assert [row["step"] for row in read_metrics(run)] == [1, 2]


@pytest.mark.slow
def test_trackio_writes_into_its_own_store(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    run = tmp_path / "말투"
    run.mkdir()
    log_with("trackio", run, 0)
    stores = list((tmp_path / "hf" / "trackio").glob("maltu*.db"))
    assert stores
    with contextlib.closing(sqlite3.connect(stores[0])) as store:
        rows = [json.loads(text) for (text,) in store.execute("select metrics from metrics order by step")]
    assert {"loss": 2.5} in rows
