"""Where numbers go: a file always; tensorboard, wandb, trackio when the recipe asks.

A tracker never stops a run and never asks a question: one that fails is named once and left out from then on.
Without a key wandb writes offline. What this room does not know: what the numbers mean.
"""

import contextvars
import json
import netrc
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from toolkit import disk

END_SECONDS = 5.0  # how long a tracker may take to end
WANDB_ID = "wandb/run_id"  # in the run folder: the wandb run that this run goes on in


class Tracker(Protocol):
    """One place that takes numbers by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers that belong to one optimizer step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a text (samples) that belongs to one optimizer step."""

    def close(self) -> None:
        """Flush and end; takes seconds at most."""


class Track:
    """metrics.jsonl, and every other tracker that was asked for."""

    def __init__(self, file: Path, trackers: Mapping[str, Tracker], warn: Callable[[str], None]) -> None:
        self._file, self._trackers, self._warn = file, dict(trackers), warn

    def log(self, step: int, **values: float) -> None:
        """Append one line {"step", "time", name: number…} and hand it to every tracker."""
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values})
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as failed:
            raise disk.cannot_write(self._file, failed) from failed
        self._each(lambda tracker: tracker.log(step, values))

    def text(self, step: int, name: str, text: str) -> None:
        """Hand a text to every tracker (the run folder keeps its own samples.md)."""
        self._each(lambda tracker: tracker.text(step, name, text))

    def close(self) -> None:
        """End every tracker, each within END_SECONDS: one that takes longer is left behind with a warning."""
        self._each(lambda tracker: _within(END_SECONDS, tracker.close))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as failed:  # whatever a third party raises, the run goes on
                del self._trackers[name]
                self._warn(
                    f"track: {name} failed ({type(failed).__name__}: {failed}) and is left out from here on;"
                    " metrics.jsonl has everything."
                )


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Call, and come back after `seconds` at the latest, with what it raised or a TimeoutError."""
    raised: list[Exception] = []

    def caught() -> None:
        try:
            call()
        except Exception as failed:
            raised.append(failed)

    here = contextvars.copy_context()  # trackio knows its run by it
    thread = threading.Thread(target=here.run, args=(caught,), daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"did not end within {seconds:g} s")
    if raised:
        raise raised[0]


def open_track(
    run_path: Path, names: Iterable[str], config: Mapping[str, Any], from_step: int, warn: Callable[[str], None]
) -> Track:
    """Open the trackers of a run. Lines of metrics.jsonl after `from_step` are dropped: a run that goes on repeats
    those steps.
    """
    file = run_path / "metrics.jsonl"
    _keep_until(file, from_step)
    openers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(run_path / "tensorboard", from_step),
        "wandb": lambda: Wandb(run_path, config),
        "trackio": lambda: Trackio(run_path, config),
    }
    trackers: dict[str, Tracker] = {}
    for name in names:
        try:
            trackers[name] = openers[name]()
        except Exception as failed:  # a tracker that does not start must not stop the run
            warn(f"track: {name} did not start ({type(failed).__name__}: {failed}); the run goes on without it.")
    return Track(file, trackers, warn)


def read_metrics(run_path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl in order; a torn last line is left out."""
    file = run_path / "metrics.jsonl"
    rows: list[dict[str, float]] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _keep_until(file: Path, step: int) -> None:
    if file.exists():
        kept = [row for row in read_metrics(file.parent) if row["step"] <= step]
        disk.write_text(file, "".join(json.dumps(row) + "\n" for row in kept))


class TensorBoard:
    """Scalars and texts as TensorBoard event files."""

    def __init__(self, folder: Path, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """A Markdown text."""
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class Wandb:
    """Weights & Biases: online with a key, else offline in the run folder. A run that goes on keeps its wandb run."""

    def __init__(self, run_path: Path, config: Mapping[str, Any]) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        settings = wandb.Settings(
            init_timeout=10, finish_timeout=END_SECONDS, silent=True, console="off", disable_git=True
        )
        self._run = wandb.init(
            project="maltu",
            name=run_path.name,
            dir=str(run_path),
            config=dict(config),
            id=_wandb_id(run_path),
            resume="allow",
            mode=mode,
            settings=settings,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row of history."""
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text as HTML-free media."""
        import html

        import wandb

        self._run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _wandb_id(run_path: Path) -> str:
    """The id of the run's wandb run; made once a run folder."""
    file = run_path / WANDB_ID
    if not file.exists():
        disk.make_folder(file.parent)
        disk.write_text(file, uuid.uuid4().hex[:8])
    return file.read_text(encoding="utf-8").strip()


def _has_wandb_key() -> bool:
    """Whether a key lies where `wandb login` puts it, or in the environment; asks nobody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    return host in hosts


class Trackio:
    """trackio's local store."""

    def __init__(self, run_path: Path, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project="maltu", name=run_path.name, config=dict(config), embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._trackio.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text as Markdown."""
        self._trackio.log({name: self._trackio.Markdown(text)}, step=step)

    def close(self) -> None:
        """End the run."""
        self._trackio.finish()
