"""The tree of errors and how a message is laid out.

One class per thing a caller can do about it. Every message says what, where, and what to do; a command prints it
without a traceback and exits with `exit_code`: 2 where the user's input has to change, 1 where something failed on
the way.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input: where it stands (a key, or file:line), what it is and what to do."""

    where: str
    says: str
    line: int | None = None

    def __str__(self) -> str:
        """One line of a message."""
        place = f"line {self.line}  " if self.line is not None else ""
        return f"{place}{self.where}: {self.says}" if self.where else f"{place}{self.says}"


class MaltuError(Exception):
    """Anything that Maltu itself reports to its user."""

    exit_code = 1


class InputError(MaltuError):
    """The user's input has to change; carries every problem found, not the first alone."""

    exit_code = 2

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source, self.problems = source, tuple(problems)
        super().__init__(lay_out(source, self.problems))


class RecipeError(InputError):
    """A recipe that cannot be run as it is written."""


class DataError(InputError):
    """A data file that cannot be read as talk, or too little of it left."""


class BaseError(MaltuError):
    """A base model that cannot be found, loaded or trusted."""

    exit_code = 2


class AdapterError(MaltuError):
    """An adapter that does not fit its base, its folder or the request."""

    exit_code = 2


class AloneError(AdapterError):
    """An adapter that no stack can hold, and that does what it should on a model of its own."""


class RunError(MaltuError):
    """A run folder that is locked, changed, unfinished or damaged."""

    exit_code = 2


class BusyError(RunError):
    """A run folder that another process is working on."""


class DiskError(RunError):
    """A file that could not be written: the disk is full, or the place is read-only."""

    exit_code = 1


class SearchError(MaltuError):
    """A study whose storage cannot be reached or read."""

    exit_code = 2


class TrainingError(MaltuError):
    """Training that could not go on: a loss that is not finite, memory that does not suffice."""


def lay_out(source: str, problems: Sequence[Problem]) -> str:
    """The message of an InputError: a heading, then a line for each problem."""
    count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
    return "\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)])
