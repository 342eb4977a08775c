"""What `python -m serve` does besides serving: make keys, take stored feedback out or delete it, describe the API."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from serve.exporting import FORMATS, write_rows
from serve.keys import new_key
from serve.settings import COMMAND
from serve.store import Store, Which
from toolkit.disk import write_file, write_text
from toolkit.errors import InputError, Problem

COMMANDS = ("key", "feedback", "openapi")


def run_command(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Run one of COMMANDS; its exit code. Raises MaltuError."""
    given = _parser(environment).parse_args(list(words))
    if given.command == "key":
        return _key(given.name, Path(given.file))
    if given.command == "openapi":
        return _openapi(given.out)
    if not given.store:
        raise InputError(f"{COMMAND} feedback", [Problem("--store", "is missing: the URL that the server prints.")])
    store = Store(given.store)
    try:
        return _export(store, given) if given.verb == "export" else _delete(store, given)
    finally:
        store.close()


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    key = commands.add_parser("key", help="API keys").add_subparsers(dest="verb", required=True)
    new = key.add_parser("new", help="make a key: it is printed once, and its hash is added to a file")
    new.add_argument("--name", required=True, help="what logs, rate limits and stored feedback call its owner")
    new.add_argument("--file", required=True, help="the file for --api-key-file, or --admin-key-file")
    feedback = commands.add_parser("feedback", help="stored feedback").add_subparsers(dest="verb", required=True)
    export = feedback.add_parser("export", help="write it as JSON lines to train on")
    export.add_argument("--format", required=True, choices=FORMATS, help="for TRL's DPO or KTO trainer, or a recipe")
    export.add_argument("--model", help="only answers of this run (its experts too) or this name")
    export.add_argument("--out", help="the file (default: standard output)")
    delete = feedback.add_parser("delete", help="delete feedback and kept conversations")
    delete.add_argument("--key", metavar="NAME", help="what came with the keys of that name")
    delete.add_argument("--conversation", metavar="ID", help="what belongs to that conversation")
    for one in (export, delete):
        one.add_argument("--store", metavar="URL", default=environment.get("MALTU_STORE"), help="where it lies")
    openapi = commands.add_parser("openapi", help="print the description of the API")
    openapi.add_argument("--out", help="the file (default: standard output)")
    return parser


def _key(name: str, file: Path) -> int:
    secret = new_key(name, file)
    sys.stdout.write(f"{secret}\n")
    sys.stderr.write(f"Keep it: it is not written anywhere. {file} holds its hash, under {name}.\n")
    return 0


def _export(store: Store, given: argparse.Namespace) -> int:
    if given.out is None:
        n_rows = write_rows(store.each(), given.format, sys.stdout, given.model)
    else:
        counts: list[int] = []

        def fill(path: Path) -> None:
            with path.open("w", encoding="utf-8", newline="\n") as file:
                counts.append(write_rows(store.each(), given.format, file, given.model))

        write_file(Path(given.out), fill)
        n_rows = counts[0]
    sys.stderr.write(f"{n_rows} rows for {given.format}.\n")
    return 0


def _delete(store: Store, given: argparse.Namespace) -> int:
    if given.key is None and given.conversation is None:
        says = "say what to delete: --key NAME, --conversation ID, or both."
        raise InputError(f"{COMMAND} feedback delete", [Problem("", says)])
    n_feedback, n_answers = store.delete(Which(given.key, given.conversation))
    sys.stderr.write(f"Deleted: {n_feedback} pieces of feedback, {n_answers} kept answers.\n")
    return 0


def _openapi(out: str | None) -> int:
    from serve.api import describe_api

    text = json.dumps(describe_api(), ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(Path(out), text)
    return 0
