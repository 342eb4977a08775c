"""Files to rows: jsonl, json, csv, parquet (jsonl, json and csv also as .gz), each row with the place it stands.

A row that cannot be read becomes a Problem in the stream and reading goes on with the next row, as far as the file
allows. Memory: one row at a time (json: the whole file, at most MAX_JSON bytes; parquet: BATCH rows).
"""

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from toolkit.corpus.hub import HUB, hub_rows
from toolkit.corpus.row import MAX_ROW, Row, cut
from toolkit.errors import Problem
from toolkit.shipped import resolve

MAX_JSON = 256_000_000
BATCH = 1024
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class _UnreadableError(Exception):
    """The rest of the file cannot be read; carries the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.says)
        self.problem = problem


@dataclass(frozen=True)
class _File:
    """A file as the user named it, where it lies, and what its name says it holds."""

    name: str
    path: Path
    kind: str
    packed: bool

    def open(self) -> BinaryIO:
        return io.BufferedReader(gzip.GzipFile(self.path)) if self.packed else self.path.open("rb")

    def at(self, place: int | str) -> str:
        return f"{self.name}:{place}"


def read_rows(name: str) -> Iterator[Row | Problem]:
    """The rows of one file or hub dataset in order; what cannot be read comes as a Problem in its place.

    `name` is a path (relative to the working directory), `maltu:…` for a shipped file, or `hub:NAME[:config][:split]`.
    A file without a single row is a problem too.
    """
    if name.startswith(HUB):
        yield from hub_rows(name)
        return
    file = _find(name)
    if isinstance(file, Problem):
        yield file
        return
    readers = {".csv": _csv, ".parquet": _parquet, ".json": _json}
    is_empty = True
    try:
        for row in readers.get(file.kind, _jsonl)(file):
            is_empty = False
            yield row
    except _UnreadableError as error:
        is_empty = False
        yield error.problem
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        is_empty = False
        yield Problem(name, f"the gzip file is damaged or cut short ({error}); download or pack it again")
    except OSError as error:
        is_empty = False
        yield Problem(name, f"cannot be read: {error.strerror or error}")
    if is_empty:
        yield Problem(name, "holds no rows: put at least one conversation in it, or take it out of the recipe")


def _find(name: str) -> _File | Problem:
    path = resolve(name)
    stem, packed = (path.name[:-3], True) if path.name.endswith(".gz") else (path.name, False)
    kind = next((suffix for suffix in SUFFIXES if stem.lower().endswith(suffix)), "")
    try:
        if path.is_dir():
            return Problem(name, f"is a folder; name the files in it, such as {_some_file(path)}")
        if not path.exists():
            return Problem(name, f"there is no such file{_nearest(path)}")
        if not path.is_file():
            return Problem(name, "is not a regular file")
    except OSError as error:
        return Problem(name, f"cannot be read: {error.strerror or error}")
    if not kind:
        return Problem(name, "its ending is not known; known are .jsonl, .json, .csv (each also .gz) and .parquet")
    if packed and kind == ".parquet":
        return Problem(name, "a parquet file is packed by itself; unpack the .gz")
    return _File(name, path, kind, packed)


def _some_file(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir() if path.name.removesuffix(".gz").endswith(SUFFIXES))
    return str(folder / found[0]) if found else "one ending in .jsonl (there is none in it)"


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f": the folder {path.parent} does not exist either"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
    return f". Did you mean {path.parent / near[0]}?" if near else f" in {path.parent.resolve()}"


def _lines(file: _File) -> Iterator[tuple[int, bytes | Problem]]:
    """Lines with their numbers, without a BOM; a line over MAX_ROW bytes comes as a Problem and is skipped."""
    with file.open() as stream:
        number = 0
        while line := stream.readline(MAX_ROW + 1):
            number += 1
            if number == 1:
                if line.startswith(UTF_16):
                    says = "is saved as UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"
                    raise _UnreadableError(Problem(file.name, says))
                line = line.removeprefix(BOM)
            if len(line) > MAX_ROW and not line.endswith(b"\n"):
                while (rest := stream.readline(MAX_ROW)) and not rest.endswith(b"\n"):
                    pass
                yield number, Problem(file.at(number), _too_long(cut(line[:400].decode("utf-8", "replace"))))
            else:
                yield number, line


def _too_long(row: str) -> str:
    return (
        f"one row is longer than {MAX_ROW // 1_000_000} MB; no conversation is. Split it into several rows "
        f"(a book: a paragraph each)\n      the row: {row}"
    )


def _decode(file: _File, number: int, line: bytes) -> str:
    """The line as text. Raises: ValueError for the line; _UnreadableError where the file is in cp949."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        if _looks_korean(line):
            says = (
                "is not UTF-8 but cp949 (EUC-KR, Korean Windows or Excel); save it as UTF-8 (in Excel: 'CSV UTF-8'), "
                f"or: iconv -f cp949 -t UTF-8 {file.path.name} > utf8{file.kind}"
            )
            raise _UnreadableError(Problem(file.at(number), says)) from None
        says = f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8; save the file as UTF-8"
        raise ValueError(f"{says}\n      the row: {cut(line[:400].decode('utf-8', 'replace'))}") from None


def _looks_korean(line: bytes) -> bool:
    """Whether the bytes read as cp949 and most of what is not ASCII then is Hangul."""
    try:
        odd = [char for char in line.decode("cp949") if not char.isascii()]
    except UnicodeDecodeError:
        return False
    return 2 * sum("가" <= char <= "힣" for char in odd) > len(odd)


def _jsonl(file: _File) -> Iterator[Row | Problem]:
    for number, line in _lines(file):
        where = file.at(number)
        if isinstance(line, Problem):
            yield line
        elif line.strip():
            try:
                yield _row(where, parse(_decode(file, number, line).rstrip()))
            except ValueError as error:
                yield Problem(where, str(error))


def _row(where: str, value: object) -> Row | Problem:
    if isinstance(value, Mapping):
        return Row(where, value)
    hint = "; is the whole file one JSON list? Then its name must end in .json" if isinstance(value, list) else ""
    return Problem(where, f'a row is one JSON object, such as {{"messages": […]}}, not {cut(repr(value))}{hint}')


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; which one counts? Keep one")
    return found


def _no_constant(word: str) -> object:
    raise ValueError(f"{word} is not JSON; write null or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def parse(text: str) -> object:
    """One JSON value by the letter of the standard: no NaN, no key twice. Raises: ValueError that shows the text."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        says = f"not JSON: {error.msg} at {line}column {error.colno}"
    except RecursionError:
        says = "the JSON is nested too deeply to be talk"
    except ValueError as error:
        says = str(error)
    raise ValueError(f"{says}\n      the row: {cut(text)}")


def _json(file: _File) -> Iterator[Row | Problem]:
    """A JSON list of rows; JSON lines under a .json name are read as such."""
    with file.open() as stream:
        head = stream.read(4096).removeprefix(BOM).lstrip()
        if head.startswith(b"{"):
            yield from _jsonl(file)
            return
        stream.seek(0)
        raw = stream.read(MAX_JSON + 1)
    if len(raw) > MAX_JSON:
        says = f"a JSON list of more than {MAX_JSON // 1_000_000} MB; save it as .jsonl, one row a line"
        raise _UnreadableError(Problem(file.name, says))
    if not raw.strip():
        return
    if raw.startswith(UTF_16):
        raise _UnreadableError(Problem(file.name, "is saved as UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"))
    try:
        value = parse(_decode(file, 1, raw.removeprefix(BOM)))
    except ValueError as error:
        raise _UnreadableError(Problem(file.name, str(error))) from None
    if not isinstance(value, list):
        raise _UnreadableError(Problem(file.name, f"a .json file holds a list of rows, not {cut(repr(value))}"))
    for number, item in enumerate(value, 1):
        yield _row(file.at(number), item)


def _csv(file: _File) -> Iterator[Row | Problem]:
    """RFC 4180 with a header line; a quoted field may hold commas, quotes written twice and line ends."""
    reader = csv.reader(_text_lines(file), strict=True)
    header: list[str] = []
    start = 1
    try:
        for fields in reader:
            if not header:
                header = _header(file, fields)
            elif len(fields) == len(header):
                yield Row(file.at(start), dict(zip(header, fields, strict=True)))
            elif fields:
                says = (
                    f"{len(fields)} fields where the header names {len(header)}; put quotes around a field with a comma"
                )
                yield Problem(file.at(start), f"{says}\n      the row: {cut(','.join(fields))}")
            start = reader.line_num + 1
    except csv.Error as error:
        says = f"not CSV as RFC 4180 has it ({error}); is a quote opened near this line and never closed?"
        raise _UnreadableError(Problem(file.at(start), says)) from None


def _text_lines(file: _File) -> Iterator[str]:
    for number, line in _lines(file):
        if isinstance(line, Problem):
            raise _UnreadableError(line)
        try:
            yield _decode(file, number, line)
        except ValueError as error:
            raise _UnreadableError(Problem(file.at(number), str(error))) from None


def _header(file: _File, fields: list[str]) -> list[str]:
    names = [field.strip() for field in fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _UnreadableError(Problem(file.at(1), f"the header names the column {twice[0]!r} twice; rename one"))
    if len(names) == 1 and any(sign in names[0] for sign in ";\t|"):
        says = f"the header {cut(names[0])!r} is one column; separate columns with commas"
        raise _UnreadableError(Problem(file.at(1), says))
    return names


def _parquet(file: _File) -> Iterator[Row | Problem]:
    import pyarrow  # takes 0.2 s: only where a parquet file is named
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(file.at(number), value)
    except pyarrow.ArrowException as error:
        says = f"not a parquet file that can be read ({cut(str(error))}); write it again, or save it as .jsonl"
        raise _UnreadableError(Problem(file.name, says)) from None
