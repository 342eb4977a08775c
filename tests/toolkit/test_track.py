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

from toolkit.track import Track, config_of, open_track, read_metrics, sample_cells
from toolkit.trackers.contract import Cells
from toolkit.trackers.in_wandb import RUN_ID


class Broken:
    def log(self, step: int, values: Mapping[str, float]) -> None:
        raise ConnectionError("no network")

    def text(self, step: int, name: str, text: str) -> None:
        raise ConnectionError("no network")

    def table(self, step: int, name: str, cells: Cells) -> None:
        raise ConnectionError("no network")

    def files(self, name: str, folder: Path) -> None:
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


def test_what_is_measured_in_the_end_stands_once_however_often_it_is_measured(tmp_path: Path) -> None:
    for from_step in (0, 2, 2):  # killed twice between its last number and its end, with a checkpoint of its last step
        track = open_track(tmp_path, (), {}, from_step, pytest.fail)
        for step in range(from_step + 1, 3):
            track.log(step, loss=float(step))
        track.log(2, **{"test/loss": 1.5})
    found = [name for row in read_metrics(tmp_path) for name in row if name not in ("step", "time")]
    assert found == ["loss", "loss", "test/loss"]


def shown_in_tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every number with its step, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def as_an_earlier_process(run: Path) -> None:
    """Its file came long before: the files of one second are in no order."""
    for number, file in enumerate(sorted(run.glob("tensorboard/events.*"))):
        file.rename(file.with_name(f"events.out.tfevents.{number:010d}"))


@pytest.mark.parametrize("is_written", [True, False])
@pytest.mark.parametrize("from_step", [0, 3])
def test_tensorboard_shows_a_step_once_that_is_taken_again(tmp_path: Path, from_step: int, is_written: bool) -> None:
    """A killed process told more steps than its checkpoint holds; or it had not written them yet."""
    track = open_track(tmp_path, ("tensorboard",), {}, 0, pytest.fail)
    for step in range(1, 6):
        track.log(step, loss=float(step))
    track.close()
    as_an_earlier_process(tmp_path)
    if not is_written:
        for file in tmp_path.glob("tensorboard/events.*"):
            file.write_bytes(b"")
    again = open_track(tmp_path, ("tensorboard",), {}, from_step, pytest.fail)
    for step in range(from_step + 1, 8):
        again.log(step, loss=float(step))
    again.close()
    assert shown_in_tensorboard(tmp_path) == {"loss": [(step, float(step)) for step in range(1, 8)]}


def test_tensorboard_shows_a_member_once_that_goes_on_from_a_step_of_its_own(tmp_path: Path) -> None:
    track = open_track(tmp_path, ("tensorboard",), {}, -1, pytest.fail)
    for step in range(1, 6):
        track.log(step, **{"loss/짧게": 1.0, "loss/상냥": 2.0})
    track.close()
    as_an_earlier_process(tmp_path)
    again = open_track(tmp_path, ("tensorboard",), {}, 5, pytest.fail)
    for step in range(3, 8):
        again.log(step, **{"loss/짧게": 1.0})
    again.close()
    wanted = {"loss/짧게": [(step, 1.0) for step in range(1, 8)], "loss/상냥": [(step, 2.0) for step in range(1, 6)]}
    assert shown_in_tensorboard(tmp_path) == wanted


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


def test_a_tracker_that_hangs_holds_up_no_step(tmp_path: Path) -> None:
    entered, let_go = threading.Event(), threading.Event()

    class Hanging(Broken):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            entered.set()
            let_go.wait(60)

        def close(self) -> None:
            pass

    said: list[str] = []
    track = Track(tmp_path / "metrics.jsonl", {"hanging": Hanging()}, said.append)
    for step in range(1, 101):
        track.log(step, loss=1.0)
    assert entered.wait(10) and not let_go.is_set()
    assert len(read_metrics(tmp_path)) == 100
    let_go.set()
    track.close()
    assert not said


def test_a_tracker_that_is_slow_to_start_is_told_later_what_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start, heard = threading.Event(), list[int]()

    class Slow(Broken):
        def __init__(self, about: object) -> None:
            may_start.wait(60)

        def log(self, step: int, values: Mapping[str, float]) -> None:
            heard.append(step)

        def close(self) -> None:
            pass

    monkeypatch.setattr("toolkit.track.WAIT_SECONDS", 0.05)
    monkeypatch.setattr("toolkit.track.OPENERS", {"slow": Slow})
    track = open_track(tmp_path, ("slow",), {}, 0, pytest.fail)
    track.log(1, loss=1.0)
    assert heard == []
    may_start.set()
    track.log(2, loss=1.0)
    track.close()
    assert heard == [1, 2]


def test_a_tracker_that_ends_its_thread_ends_nothing_else(tmp_path: Path) -> None:
    class Leaving(Broken):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            raise SystemExit(3)

    said: list[str] = []
    track = Track(tmp_path / "metrics.jsonl", {"leaving": Leaving()}, said.append)
    track.log(1, loss=1.0)
    track.close()
    assert len(said) == 1 and "SystemExit: 3" in said[0]


def test_calls_reach_a_tracker_in_their_order(tmp_path: Path) -> None:
    heard: list[object] = []

    class Listening(Broken):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            heard.append((step, dict(values)))

        def text(self, step: int, name: str, text: str) -> None:
            heard.append((step, text))

        def table(self, step: int, name: str, cells: Cells) -> None:
            heard.append((step, cells.markdown()))

        def files(self, name: str, folder: Path) -> None:
            heard.append((name, folder))

        def close(self) -> None:
            heard.append("closed")

    track = Track(tmp_path / "metrics.jsonl", {"listening": Listening()}, pytest.fail)
    track.log(1, loss=2.0)
    track.text(2, "samples", "안녕")
    track.table(2, "answers", Cells(("prompt", "after"), [("밥 | 먹자", None)]))
    track.files("말투", tmp_path)
    track.close()
    assert heard == [
        (1, {"loss": 2.0}),
        (2, "안녕"),
        (2, "| prompt | after |\n|---|---|\n| 밥 \\| 먹자 |  |"),
        ("말투", tmp_path),
        "closed",
    ]


INPUTS = {
    "recipe": {"name": "말투", "train.seed": 0, "train.epochs": 3.0, "search": None},
    "data": {"말.jsonl": "abc"},
    "base": "def",
}


def test_the_config_holds_the_hashes_of_recipe_data_and_base() -> None:
    config = config_of(INPUTS)
    assert config["sha256.data.말.jsonl"] == "abc" and config["sha256.base"] == "def"
    assert len(config["sha256.recipe"]) == 64 and config["train.epochs"] == 3.0


def test_runs_of_one_recipe_share_a_hash_whatever_their_name_and_seed() -> None:
    def hash_of(**changed: object) -> str:
        return str(config_of({**INPUTS, "recipe": {**INPUTS["recipe"], **changed}})["sha256.recipe"])  # type: ignore[dict-item]

    assert hash_of(name="다른") == hash_of(**{"train.seed": 7}) == hash_of()
    assert hash_of(**{"train.epochs": 4.0}) != hash_of()


def test_answers_stand_beside_each_other_in_a_table() -> None:
    def found(answer: str) -> dict[str, object]:
        return {"samples": [{"name": "1", "lang": "ko", "prompt": "뭐 해?", "answer": answer}]}

    assert list(sample_cells(found("잔다"), found("자")).rows) == [("1", "ko", "뭐 해?", "잔다", "자")]
    assert list(sample_cells({}, found("자")).rows) == [("1", "ko", "뭐 해?", None, "자")]


def test_tensorboard_gets_the_recipe_as_hparams_and_the_outcome(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track = open_track(tmp_path, ("tensorboard",), {"adapter.rank": 8, "이름": None}, 0, pytest.fail)
    track.log(3, **{"test/loss": 1.5})
    track.table(3, "answers", Cells(("prompt",), [("뭐 해?",)]))
    track.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = events.summary_metadata
    assert {"_hparams_/session_start_info", "_hparams_/experiment", "answers/text_summary"} <= set(found)
    assert b"adapter.rank" in found["_hparams_/session_start_info"].plugin_data.content
    assert b"test/loss" in found["_hparams_/experiment"].plugin_data.content


SCRIPT = """
import sys
from pathlib import Path
from toolkit.track import open_track
from toolkit.trackers.contract import Cells

run, name, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
said = []
track = open_track(run, (name,), {"이름": "tiny"}, step, said.append)
track.log(step + 1, loss=2.5)
track.text(step + 1, "samples", "안녕")
track.table(step + 1, "answers", Cells(("prompt", "after"), [("뭐 해?", "잔다"), ("비", None)]))
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
    own_id = (run / RUN_ID).read_text()
    files = sorted(file for file in run.glob("wandb/offline-run-*/run-*.wandb") if file.stat().st_size)
    assert [file.name for file in files] == [f"run-{own_id}.wandb"] * 2
    assert [row["step"] for row in read_metrics(run)] == [1, 2]


@pytest.mark.slow
def test_trackio_shows_every_step_once_in_its_own_store_however_often_the_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    run = tmp_path / "말투"
    run.mkdir()
    for from_step in (0, 0, 1):  # killed before its first checkpoint, then after one
        log_with("trackio", run, from_step)
    (place,) = (tmp_path / "hf" / "trackio").glob("maltu*.db")
    with contextlib.closing(sqlite3.connect(place)) as store:
        rows = list(store.execute("select run_id, run_name, step, metrics from metrics order by step"))
    assert [step for *_, step, text in rows if json.loads(text) == {"loss": 2.5}] == [1, 2]
    assert {tuple(of) for *of, _, _ in rows} == {((run / "trackio" / "run_id").read_text(), "말투")}
