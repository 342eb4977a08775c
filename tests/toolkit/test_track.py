"""Numbers reach the file always, and no tracker can stop a run."""

from collections.abc import Mapping
from pathlib import Path

from toolkit.track import Track, open_track, read_metrics


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
