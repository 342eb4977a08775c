"""What reading a file gives: one row, and how a row is shown in a message."""

from collections.abc import Mapping
from dataclasses import dataclass

MAX_ROW = 4_000_000
SHOWN = 160


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file and the place it stands (`file:line`; in parquet, json and hub datasets `file:row`, from 1)."""

    where: str
    value: Mapping[str, object]


def cut(text: str, length: int = SHOWN) -> str:
    """The text on one line, at most `length` characters of it."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length and len(text) <= 4 * length else line[: length - 1] + "…"
