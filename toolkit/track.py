"""Where numbers go: a file always; tensorboard, wandb, trackio when the recipe asks.

A tracker never stops a run, never makes it wait and never asks a question: each works in a thread of its own
(trackers/apart.py), and one that fails is named once and left out from then on. Without a key wandb writes offline.
What this room does not know: what the numbers mean.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from toolkit import disk
from toolkit.trackers.apart import Apart, Call
from toolkit.trackers.contract import END_SECONDS, OF_A_LINE, OF_THE_END, About, Cells, Tracker, last_steps
from toolkit.trackers.in_tensorboard import TensorBoard
from toolkit.trackers.in_trackio import Trackio
from toolkit.trackers.in_wandb import Wandb, end_seconds

OPENERS: Mapping[str, Callable[[About], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
WAIT_SECONDS = 5.0
NOT_OF_THE_RECIPE = ("name", "train.seed", "serve.", "track")  # runs that differ in these alone belong together


class Track:
    """metrics.jsonl, and every other tracker that was asked for.

    trackers: those that still work. told: the step up to which they have each number from earlier processes; a member
    that learns those steps again is written once more, and not told. seconds: what their calls held up, by the clock.
    """

    def __init__(
        self,
        file: Path,
        trackers: Mapping[str, Tracker | Apart],
        warn: Callable[[str], None],
        told: Mapping[str, int] | None = None,
    ) -> None:
        self._file, self._warn, self._told = file, warn, told or {}
        self.trackers = {name: one if isinstance(one, Apart) else _put_apart(one) for name, one in trackers.items()}
        self.seconds = 0.0

    def log(self, step: int, **values: float) -> None:
        """Append one line {"step", "time", name: number…} and hand it to every tracker."""
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values})
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as failed:
            raise disk.cannot_write(self._file, failed) from failed
        new = {name: of for name, of in values.items() if step > self._told.get(name, -1)}
        if new:
            self._each(lambda tracker: tracker.log(step, new))

    def text(self, step: int, name: str, text: str) -> None:
        """Hand a text to every tracker (the run folder keeps its own samples.md)."""
        self._each(lambda tracker: tracker.text(step, name, text))

    def table(self, step: int, name: str, cells: Cells) -> None:
        """Hand a table to every tracker."""
        self._each(lambda tracker: tracker.table(step, name, cells))

    def files(self, name: str, folder: Path) -> None:
        """Hand what was trained to the trackers that the recipe asks to keep it."""
        self._each(lambda tracker: tracker.files(name, folder))

    def close(self) -> None:
        """End every tracker, each within its time: one that takes longer is left behind with a warning."""
        for name, tracker in list(self.trackers.items()):
            self._try(name, partial(tracker.close, tracker.end_s))
        self.trackers = {}

    def _each(self, call: Call) -> None:
        for name, tracker in list(self.trackers.items()):
            self._try(name, partial(tracker.call, call))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            call()
        except Exception as failed:  # whatever a third party raises, the run goes on
            del self.trackers[name]
            self._warn(
                f"track: {name} failed ({_said(failed)}) and is left out from here on; metrics.jsonl has everything."
            )
        finally:
            self.seconds += time.perf_counter() - started


def _put_apart(tracker: Tracker) -> Apart:
    return Apart(lambda: tracker, END_SECONDS)


def _said(failed: Exception) -> str:
    return f"{type(failed).__name__}: {failed}"


def open_track(
    run_path: Path, names: Iterable[Any], config: Mapping[str, Any], from_step: int, warn: Callable[[str], None]
) -> Track:
    """Open the trackers of a run: their names, or the recipe's sections that name one with its options.

    config: flat, as `config_of` gives it. Lines of metrics.jsonl after `from_step` are dropped: a run that goes on
    repeats those steps, and trackers show them once. Cost: WAIT_SECONDS at most; a tracker that takes longer to start
    goes on with that beside the run, and is told then what it missed.
    """
    file = run_path / "metrics.jsonl"
    told, gone = _keep_until(file, from_step)
    group, job = _group(run_path.name, config)
    opening: dict[str, Apart] = {}
    for name, options in map(_with_options, names):
        about = About(run_path, config, group, job, options, told, gone)
        opening[name] = Apart(partial(OPENERS[name], about), end_seconds(options) if name == "wandb" else END_SECONDS)
    until = time.monotonic() + WAIT_SECONDS
    opened: dict[str, Tracker | Apart] = {}
    for name, tracker in opening.items():
        try:
            tracker.wait_open(max(0.0, until - time.monotonic()))
            opened[name] = tracker
        except Exception as failed:  # a tracker that does not start must not stop the run
            warn(f"track: {name} did not start ({_said(failed)}); the run goes on without it.")
    return Track(file, opened, warn, last_steps(told))


def _with_options(named: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(named, str):
        return named, {}
    ((name, options),) = named.model_dump().items()
    return name, options


def config_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a tracker is told of a run, flat: the recipe's keys, and the hashes of recipe, data and base.

    `inputs`: as run.json has them (fit.inputs).
    """
    recipe = dict(inputs["recipe"])
    data = {f"sha256.data.{name}": digest for name, digest in inputs["data"].items()}
    return {**recipe, "sha256.recipe": _recipe_hash(recipe), **data, "sha256.base": inputs["base"]}


def _recipe_hash(recipe: Mapping[str, Any]) -> str:
    told = {key: of for key, of in recipe.items() if not key.startswith(NOT_OF_THE_RECIPE)}
    return disk.hash_text(json.dumps(told, sort_keys=True, ensure_ascii=False, default=str))


def _group(name: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """What a run stands together with, and what it does: a search with its workers, a run with those of its recipe."""
    if any(key.startswith("search.") and of is not None for key, of in config.items()):
        return f"search {name}", "search"
    digest = str(config.get("sha256.recipe") or _recipe_hash(config))
    return f"recipe {digest[:8]}", "train"


def sample_cells(before: Mapping[str, Any], after: Mapping[str, Any]) -> Cells:
    """What a judge found as a table: every prompt with its answer before and after; empty where none was answered."""
    old = {sample["name"]: sample["answer"] for sample in before.get("samples", ())}
    rows = [
        (one["name"], one["lang"], one["prompt"], old.get(one["name"]), one["answer"])
        for one in after.get("samples", ())
    ]
    return Cells(("name", "lang", "prompt", "before", "after"), rows)


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


def drop_numbers(run_path: Path, is_kept: Callable[[str, int], bool]) -> None:
    """Keep of metrics.jsonl the numbers for whose name and step this holds; a line without any goes. For those of
    several that learn at once, each of which goes on from a step of its own.
    """
    file, lines, changed = run_path / "metrics.jsonl", [], False
    for row in read_metrics(run_path):
        kept = {name: of for name, of in row.items() if name in OF_A_LINE or is_kept(name, int(row["step"]))}
        changed |= len(kept) < len(row)
        lines += [json.dumps(kept) + "\n"] if kept.keys() - OF_A_LINE else []
    if changed:
        disk.write_text(file, "".join(lines))


def last_step(run_path: Path) -> int:
    """The highest step of metrics.jsonl, 0 where there is none."""
    return max((int(row["step"]) for row in read_metrics(run_path)), default=0)


def _keep_until(file: Path, step: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Drop what was learned after a step, and what was measured in the end; what stays, and what went."""
    kept: list[dict[str, float]] = []
    gone: list[dict[str, float]] = []
    for row in read_metrics(file.parent):
        is_lasting = row["step"] <= step and not any(name.startswith(OF_THE_END) for name in row)
        (kept if is_lasting else gone).append(row)
    if file.exists():
        disk.write_text(file, "".join(json.dumps(row) + "\n" for row in kept))
    return kept, gone
