"""Everything that a page says of a run, read once from its folder; nothing else of the report opens a file of it."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from toolkit.bundle import Run
from toolkit.card import Compared, compared
from toolkit.errors import RecipeError, RunError
from toolkit.recipe.read import read_recipe
from toolkit.report.scale import Point
from toolkit.report.words import number, within, within_list
from toolkit.track import read_metrics
from toolkit.trackers.contract import LOSS_OF, VALID_LOSS_OF

REQUIRED = "\0required"  # stands for what a key is that has to be written
TOLD = ("inputs", "data", "fit", "results", "surroundings")


@dataclass(frozen=True)
class Seen:
    """A finished run. metrics: the lines of metrics.jsonl. trials: the rows of search/trials.csv. changed: the recipe's
    keys that differ from what they are when nothing is written (REQUIRED: they have to be), with both values; None: it
    cannot be told.
    """

    path: Path
    name: str
    facts: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    trials: Sequence[Mapping[str, str]]
    changed: Mapping[str, tuple[Any, Any]] | None

    @property
    def task(self) -> str:
        """chat, classify or text2text."""
        return str(self.facts.get("task") or "chat")

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe by dotted key."""
        return within(self.facts, "inputs", "recipe")

    @property
    def before(self) -> Mapping[str, Any]:
        """What was measured of the bare base; empty where it could not be."""
        return within(self.facts, "results", "before")

    @property
    def after(self) -> Mapping[str, Any]:
        """What was measured of the run."""
        return within(self.facts, "results", "after")

    @property
    def numbers(self) -> list[Compared]:
        """Every number before and after, as the card has them."""
        return compared({"before": self.before, "after": self.after})

    def points(self, name: str) -> list[Point]:
        """(step, value) of a number of metrics.jsonl, those that are finite, in the order of steps."""
        found = ((number(line.get("step")), number(line.get(name))) for line in self.metrics)
        return sorted((step, value) for step, value in found if step is not None and value is not None)

    def learners(self) -> list[str]:
        """Those of several that learned side by side, in the order in which they began."""
        names = dict.fromkeys(
            name for line in self.metrics for name in line if name.startswith((LOSS_OF, VALID_LOSS_OF))
        )
        return list(dict.fromkeys(name.partition("/")[2] for name in names))

    def samples(self, of: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The answers that were measured."""
        return [one for one in within_list(of, "samples") if "answer" in one]

    @property
    def n_judged_by(self) -> int:
        """How many held-out conversations the numbers are of."""
        parts = within(self.facts, "data", "parts")
        return int(number(parts.get("test")) or number(parts.get("valid")) or 0)


def see(run: Run) -> Seen:
    """Read a finished run. Raises: RunError for one that is not finished, or damaged."""
    facts = run.finished(*TOLD)
    try:
        metrics = [line for path in (run.path, *_own_runs(run)) for line in _lines(run.path, path)]
        trials = _trials(run)
    except (OSError, ValueError, csv.Error) as damaged:
        says = "metrics.jsonl or search/trials.csv cannot be read"
        raise RunError(f"{run.path}: {says} ({damaged}). Restore it from a copy.") from damaged
    return Seen(run.path, run.name, facts, metrics, trials, _changed(run))


def _own_runs(run: Run) -> list[Path]:
    """Members on bases of their own, which learned as runs inside this one."""
    return sorted(folder.parent for folder in (run.path / "experts").glob("*/metrics.jsonl"))


def _lines(whole: Path, path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; of a run inside another its losses, under its name."""
    lines = [line for line in read_metrics(path) if isinstance(line, dict)]
    if path == whole:
        return lines
    names = {"loss": LOSS_OF + path.name, "valid_loss": VALID_LOSS_OF + path.name}
    found = [
        {"step": line.get("step")} | {names[name]: of for name, of in line.items() if name in names} for line in lines
    ]
    return [line for line in found if len(line) > 1]


def _trials(run: Run) -> list[dict[str, str]]:
    file = run.path / "search" / "trials.csv"
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(lines)]


def _changed(run: Run) -> dict[str, tuple[Any, Any]] | None:
    if not run.recipe_file.exists():
        return None
    try:
        recipe = read_recipe(run.recipe_file, to_run=False)
    except RecipeError:  # of another version
        return None
    return dict(changed_keys(recipe))


def changed_keys(section: BaseModel, prefix: str = "") -> list[tuple[str, tuple[Any, Any]]]:
    """The keys of a section that are not as when nothing is written: dotted name, (value, what it is else)."""
    found: list[tuple[str, tuple[Any, Any]]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        usual = REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
        key = f"{prefix}{name}"
        if isinstance(value, BaseModel):
            if type(value) is not type(usual) and hasattr(value, "kind"):
                found.append((f"{key}.kind", (value.kind, getattr(usual, "kind", None))))
            found += [one for one in changed_keys(value, f"{key}.") if one[0] != f"{key}.kind"]
        elif field.is_required() or value != usual:
            found.append((key, (_plain(value), _plain(usual))))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
