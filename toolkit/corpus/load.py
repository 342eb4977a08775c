"""Files to talks: which shape the rows have, and every bad row reported with its place, itself and the accepted shapes.

Streams: memory holds one row (rows.py says where more). What a row may look like is in shapes.py.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from toolkit.corpus.row import Row, cut
from toolkit.corpus.rows import read_rows
from toolkit.corpus.shapes import (
    READERS,
    SHAPES,
    BadRowError,
    Format,
    read_columns,
    read_labels,
)
from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import DataError, Problem
from toolkit.recipe.model import Columns, Labels

MAX_PROBLEMS = 20
LANGUAGE_LENGTH = 12
# Names that ask and answer columns go by, for the proposal that an error makes; nothing is read by them silently.
PAIRS = (
    ("question", "answer"), ("user", "assistant"), ("input", "output"), ("input", "target"), ("source", "target"),
    ("query", "response"), ("Q", "A"), ("context", "response"), ("document", "summary"), ("written", "spoken"),
    ("ko", "en"),
)  # fmt: skip
TEXTS = ("text", "document", "sentence", "review", "content", "utterance")
LABELS = ("label", "labels", "intent", "category", "class")


@dataclass(frozen=True)
class Sniffed:
    """What the first rows of a file look like.

    `format` is what data.format would say, None where nothing fits; `is_sure` is False where it is a proposal from
    column names that `auto` does not act on. `fields` are the columns of the first row, `row` is that row.
    """

    format: Format | None
    is_sure: bool
    fields: tuple[str, ...]
    row: Mapping[str, object]


def sniff(file: str) -> Sniffed:
    """Look at the first row of a file. Raises DataError where it has none that can be read."""
    for row in read_rows(file):
        if isinstance(row, Problem):
            raise DataError(file, [row])
        found = _shape_of(row.value)
        fields = tuple(map(str, row.value))
        return Sniffed(found or _propose(row.value), found is not None, fields, row.value)
    raise DataError(file, [Problem(file, "holds no rows")])


def load_talks(files: Sequence[str], format: Format, system: str | None) -> Iterator[Talk]:
    """Every conversation of the files, in order, as the rows say it (nothing is cleaned here).

    `format` is `auto` (each file's first row decides for the file), a name of shapes.SHAPES, or a Columns or Labels
    section; `system` is put before conversations that have no system turn (running text excepted).
    Raises: DataError with every problem, once all files are read or MAX_PROBLEMS are found; talks come before it, so a
    caller must not act on them until the iterator has ended.
    """
    return (talk for _, talk in load_numbered(files, format, system))


def load_numbered(files: Sequence[str], format: Format, system: str | None) -> Iterator[tuple[int, Talk]]:
    """What load_talks gives, each with the place of its file in `files`."""
    problems: list[Problem] = []
    for place, file in enumerate(files):
        for found in _read_file(file, format, system):
            if isinstance(found, Talk):
                yield place, found
                continue
            problems.append(found)
            if len(problems) == MAX_PROBLEMS:
                last = Problem(found.where, f"{found.says}\n  … stopped here, after {MAX_PROBLEMS} problems")
                raise DataError(_heading(files), [*problems[:-1], last])
    if problems:
        raise DataError(_heading(files), problems)


def _read_file(file: str, format: Format, system: str | None) -> Iterator[Talk | Problem]:
    shape = None if format == "auto" else format
    is_first = True
    for row in read_rows(file):
        if isinstance(row, Problem):
            yield row
            continue
        try:
            shape = shape or _decide(row)
            yield _talk(row, shape, system)
        except BadRowError as error:
            yield _problem(row, str(error), shape, is_first)
            is_first = False
            if shape is None:  # without a shape, every further row would say the same
                return


def _heading(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _problem(row: Row, says: str, shape: Format | None, is_first: bool) -> Problem:
    shown = cut(json.dumps(row.value, ensure_ascii=False, default=repr))
    text = f"{says}\n      the row: {shown}"
    return Problem(row.where, f"{text}\n      accepted: {accepted(shape)}" if is_first else text)


def accepted(shape: Format | None) -> str:
    """The shapes a row may have under a format, as one line; None means any of them."""
    if isinstance(shape, Columns):
        return f"a row with {shape.user!r} (the user's words) and {shape.assistant!r} (the answer)"
    if isinstance(shape, Labels):
        return f"a row with {shape.text!r} (the text) and {shape.label!r} (its label)"
    if shape is not None:
        return SHAPES[shape]
    named = "any columns, named: format: {kind: columns, user: …, assistant: …} or {kind: labels, text: …, label: …}"
    return " | ".join([*SHAPES.values(), named])


def _talk(row: Row, shape: Format, system: str | None) -> Talk:
    label = None
    if isinstance(shape, Columns):
        turns = read_columns(row.value, shape)
    elif isinstance(shape, Labels):
        turns, label = read_labels(row.value, shape)
    else:
        turns = READERS[shape](row.value)
    if system and turns and turns[0].role not in ("system", "text"):
        turns = [Turn("system", system), *turns]
    lang = row.value.get("lang")
    known = lang.strip().lower() if isinstance(lang, str) and 0 < len(lang.strip()) <= LANGUAGE_LENGTH else None
    return Talk(tuple(turns), row.where, label, known)


def _decide(row: Row) -> Format:
    """The shape of a file by its first row. Raises: BadRowError where none fits, with a proposal from the names."""
    shape = _shape_of(row.value)
    if shape is not None:
        return shape
    fields = row.value
    if "chosen" in fields and "rejected" in fields:
        raise BadRowError("has 'chosen' and 'rejected': learning from preferences is not in this version")
    columns = cut(", ".join(map(str, fields)), 120)
    proposal = _propose(fields)
    says = f"the format of a row with {columns or 'no columns'} is not known"
    raise BadRowError(f"{says}; if it fits, say data.format: {_as_yaml(proposal)}" if proposal else says)


def _shape_of(row: Mapping[str, object]) -> str | None:
    for key in ("messages", "conversations"):
        if key in row:
            turns = row[key]
            first = turns[0] if turns and isinstance(turns, list) else None
            return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if "text" in row and not any(label in row for label in LABELS):
        return "text"
    return None


def _propose(row: Mapping[str, object]) -> Columns | Labels | None:
    text = next((name for name in TEXTS if name in row), None)
    label = next((name for name in LABELS if name in row), None)
    if text and label:
        return Labels(text=text, label=label)
    pair = next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), None)
    return Columns(user=pair[0], assistant=pair[1]) if pair else None


def _as_yaml(format: Columns | Labels) -> str:
    if isinstance(format, Labels):
        return f"{{kind: labels, text: {format.text}, label: {format.label}}}"
    return f"{{kind: columns, user: {format.user}, assistant: {format.assistant}}}"
