"""`spoken FILE…`: how spoken is what each role says in data files of any format that a recipe takes."""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit.bases.spoken import SPOKEN_FROM, Manner, known_language
from toolkit.bases.spoken_features import LANGUAGES
from toolkit.corpus.load import load_talks, sniff
from toolkit.corpus.manner import manner_by_role
from toolkit.errors import DataError, InputError, Problem
from toolkit.recipe.model import Columns, Format, Labels

Measured = Mapping[str, Mapping[str, Manner]]  # by role, by language


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """spoken FILE… [--lang ko|en] [--format F] [--json]."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="jsonl, jsonl.gz, csv, parquet, hub:NAME, maltu:NAME")
    parser.add_argument("--lang", help="ko or en (default: each row's own, else guessed from the script)")
    parser.add_argument(
        "--format",
        default="auto",
        help="as data.format of a recipe: '{kind: columns, user: written, assistant: spoken}'",
    )
    parser.add_argument("--json", action="store_true", help="write JSON instead of a table")


def spoken(arguments: argparse.Namespace) -> int:
    """Score every file, then print one table, or JSON. Every file that cannot be scored is named, and none is shown.

    Raises: InputError for a language or a format that is not known, DataError for files that are no talk, or hold no
    text to score.
    """
    known_language(arguments.lang)
    form = read_format(arguments.format)
    found: dict[str, Measured] = {}
    problems: list[Problem] = []
    for file in arguments.files:
        try:
            found[file] = measure_file(file, form, arguments.lang)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(arguments.files[0] if len(arguments.files) == 1 else f"{len(arguments.files)} files", problems)
    if arguments.json:
        sys.stdout.write(json.dumps(as_json(found), ensure_ascii=False, indent=2) + "\n")
    else:
        Console(highlight=False).print(as_table(found))
    return 0


def read_format(text: str) -> Any:
    """What `--format` says, as data.format would. Raises: InputError."""
    try:
        return TypeAdapter(Format).validate_python(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError):
        says = (
            f"{text!r} is no format. Write auto, messages, sharegpt, alpaca, prompt_completion or text, or "
            "'{kind: columns, user: COLUMN, assistant: COLUMN}', or '{kind: labels, text: COLUMN, label: COLUMN}'."
        )
        raise InputError("spoken", [Problem("--format", says)]) from None


def measure_file(file: str, form: Any, lang: str | None) -> Measured:
    """The manner of each role of a file. Raises: DataError where it cannot be read, or holds no text to score."""
    measured = manner_by_role(load_talks([file], guess_format(file) if form == "auto" else form, None), lang)
    if not measured:
        raise DataError(file, [Problem(file, "holds no rows")])
    if not any(of_role["all"].n for of_role in measured.values()):
        n_other = sum(of_role["all"].n_other for of_role in measured.values())
        says = f"none of its {n_other:,} texts is Korean or English, so none is scored. Name the language with --lang."
        raise DataError(file, [Problem(file, says)])
    return measured


def guess_format(file: str) -> Any:
    """The format of a file; one that is only proposed by its columns' names is taken too, and said on standard error:
    scoring does no harm. Raises: DataError where its first row cannot be read.
    """
    sniffed = sniff(file)
    form = sniffed.format
    if form is None or sniffed.is_sure:
        return form or "auto"
    if isinstance(form, Columns):
        read = f"user: {form.user}, assistant: {form.assistant}"
    else:
        read = f"text: {form.text}, label: {form.label}" if isinstance(form, Labels) else str(form)
    sys.stderr.write(f"{file}: read as {read}, a guess from its columns; --format says otherwise.\n")
    return form


def as_json(found: Mapping[str, Measured]) -> dict[str, Any]:
    """The same for a program."""
    files = [
        {
            "file": file,
            "roles": {role: {lang: of.as_json() for lang, of in by.items()} for role, by in of_file.items()},
        }
        for file, of_file in found.items()
    ]
    return {"spoken_from": SPOKEN_FROM, "languages": list(LANGUAGES), "files": files}


def as_table(found: Mapping[str, Measured]) -> Table:
    """A row for each file, role and language. A language stands by itself only where there are two."""
    table = Table(
        caption=f"0 written … 1 spoken; spoken: turns that score {SPOKEN_FROM} or more", caption_justify="left"
    )
    for column in ("file", "role", "language"):
        table.add_column(column, overflow="fold")
    for column in ("turns", "not scored", "mean", "spoken"):
        table.add_column(column, justify="right")
    for file, of_file in found.items():
        name = file
        for role, by_language in of_file.items():
            langs = [lang for lang in by_language if lang != "all"]
            shown = by_language if len(langs) > 1 else {(langs or [""])[0]: by_language["all"]}
            for lang, of in shown.items():
                mean, share = ("", "") if not of.n else (f"{of.mean:.2f}", f"{100 * of.share:.0f} %")
                table.add_row(escape(name), role, lang, f"{of.n:,}", f"{of.n_other:,}", mean, share)
                name = ""
    return table
