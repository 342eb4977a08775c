"""Figures of others (KLUE and the like) from a CSV, to stand beside our own measurement as what they are."""

import csv
from dataclasses import dataclass
from pathlib import Path

from toolkit.bases.catalog import find
from toolkit.errors import DataError, Problem

NEEDED = ("model", "benchmark", "score")
ALLOWED = ("metric", "source")
HEADER = "model,benchmark,score (metric and source may follow)"


@dataclass(frozen=True)
class Figure:
    """One score of one model on one benchmark, as somebody else reported it."""

    model: str
    benchmark: str
    score: float
    metric: str
    source: str


@dataclass(frozen=True)
class Table:
    """A file of figures."""

    file: str
    figures: tuple[Figure, ...]

    def of(self, model: str) -> tuple[Figure, ...]:
        """The figures of one base, by any of its names."""
        names = _names(model)
        return tuple(figure for figure in self.figures if names & _names(figure.model))

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """What the figures are of, each once, in the order of the file."""
        return tuple(dict.fromkeys(_heading(figure) for figure in self.figures))

    def cell(self, model: str, benchmark: str) -> str:
        """A base's figure on one of `benchmarks`, or a dash."""
        found = [figure for figure in self.of(model) if _heading(figure) == benchmark]
        return f"{found[-1].score:g}" if found else "–"

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the file says that its figures are from."""
        return tuple(dict.fromkeys(figure.source for figure in self.figures if figure.source))


def read_table(path: Path) -> Table:
    """A CSV with a header line: model, benchmark and score, and perhaps metric and source; other columns are left.

    Raises: DataError with every line that is wrong, or the columns that are missing.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = [(name or "").strip().casefold() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            missing = [name for name in NEEDED if name not in columns]
            if missing:
                has = ", ".join(columns) or "nothing"
                says = f"columns are missing: {', '.join(missing)}; it has: {has}. Begin it with {HEADER}"
                raise DataError(str(path), [Problem("", says, 1)])
            read = [_figure(row, reader.line_num) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as broken:
        reason = getattr(broken, "strerror", None) or str(broken)
        raise DataError(str(path), [Problem("", f"cannot be read as CSV in UTF-8 ({reason})")]) from None
    problems = [one for one in read if isinstance(one, Problem)]
    figures = tuple(one for one in read if isinstance(one, Figure))
    if not read:
        problems = [Problem("", f"holds no figure. Write lines under {HEADER}")]
    if problems:
        raise DataError(str(path), problems)
    return Table(str(path), figures)


def _figure(row: dict[str, str | None], line: int) -> Figure | Problem:
    told = {name: (row.get(name) or "").strip() for name in (*NEEDED, *ALLOWED)}
    lacking = [name for name in NEEDED if not told[name]]
    if lacking:
        return Problem("", f"no {' and no '.join(lacking)}. Fill it in, or take the line out", line)
    try:
        score = float(told["score"])
    except ValueError:
        return Problem("score", f"'{told['score'][:60]}' is no number. Write it as 71.3", line)
    return Figure(told["model"], told["benchmark"], score, told["metric"], told["source"])


def _heading(figure: Figure) -> str:
    return f"{figure.benchmark} {figure.metric}".strip()


def _names(model: str) -> frozenset[str]:
    known = find(model)
    names = {model, *((known.name, known.hub_id or "") if known else ())}
    return frozenset(name.casefold().rstrip("/") for name in names if name)
