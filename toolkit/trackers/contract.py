"""What a tracker promises, and what it is told of its run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

END_SECONDS = 5.0  # how long a tracker may take to end
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
    """The run that is tracked. config: flat, recipe keys and hashes; from_step: earlier steps were told before.

    group and job: what the run belongs together with, and what it does in it. options: what the recipe says of this
    tracker beside its name.
    """

    path: Path
    config: Mapping[str, Any]
    from_step: int
    group: str
    job: str
    options: Mapping[str, Any] = field(default_factory=dict)


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
