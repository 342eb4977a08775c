"""What a tracker promises, and what it is told of its run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

END_SECONDS = 5.0  # how long a tracker may take to end
OF_A_LINE = frozenset({"step", "time"})  # of metrics.jsonl: what is no number of the run
OF_THE_END = "test/"  # how numbers begin that are measured once all is learned, and anew in a run that goes on
# How the numbers of several that learn in one run begin; a name follows, and each counts its own steps.
LOSS_OF, VALID_LOSS_OF, OF_GATE = "loss/", "valid_loss/", "gate/"


@dataclass(frozen=True)
class Cells:
    """A table: what stands over its columns, and a text, a number or nothing in each cell of its rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]

    def markdown(self) -> str:
        """The same as Markdown."""
        lines = [["" if cell is None else str(cell) for cell in row] for row in (self.columns, *self.rows)]
        shown = ["| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in row) + " |" for row in lines]
        return "\n".join([shown[0], "|---" * len(self.columns) + "|", *shown[1:]])


@dataclass(frozen=True)
class About:
    """The run that is tracked. config: flat, recipe keys and hashes.

    told: of a run that goes on, the lines of metrics.jsonl that stay, each with its `step` and `time`: nothing of them
    is told again. gone: those that do not, because their steps are taken once more and told then. A tracker shows every
    number once all the same. group and job: what the run belongs together with, and what it does in it. options: what
    the recipe says of this tracker beside its name.
    """

    path: Path
    config: Mapping[str, Any]
    group: str
    job: str
    options: Mapping[str, Any] = field(default_factory=dict)
    told: Sequence[Mapping[str, float]] = ()
    gone: Sequence[Mapping[str, float]] = ()


def numbers_of(line: Mapping[str, float]) -> dict[str, float]:
    """What a line of metrics.jsonl tells of its step."""
    return {name: of for name, of in line.items() if name not in OF_A_LINE}


def last_steps(lines: Iterable[Mapping[str, float]]) -> dict[str, int]:
    """The highest step of each number in these lines."""
    found: dict[str, int] = {}
    for line in lines:
        found |= {name: max(int(line["step"]), found.get(name, -1)) for name in numbers_of(line)}
    return found


class Tracker(Protocol):
    """One place that takes what happens by step. Whatever it raises, the run goes on without it."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers that belong to one optimizer step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a text (Markdown) that belongs to one optimizer step."""

    def table(self, step: int, name: str, cells: Cells) -> None:
        """Take a table that belongs to one optimizer step."""

    def files(self, name: str, folder: Path) -> None:
        """Take what was trained, if this tracker keeps files and the recipe asks for it."""

    def close(self) -> None:
        """Flush and end; takes seconds at most."""
