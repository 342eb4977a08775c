"""`python -m toolkit VERB` = `maltu VERB`. Each verb imports only its own room, when it is called."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from toolkit.train import report

# verb: (module, what it says in --help). A module offers add_arguments(parser) and a function named like the verb.
VERBS = {
    "init": ("toolkit.start", "look at files and write a recipe for them"),
    "check": ("toolkit.check", "say what a recipe would do, before it does it"),
    "train": ("toolkit.train", "train what a recipe says"),
    "evaluate": ("toolkit.judge", "measure a run on its held-out talk, or on files"),
    "chat": ("toolkit.chat", "talk to a run in the terminal"),
    "choose": ("toolkit.choose.command", "compare the bases that a recipe names, on its talk"),
    "spoken": ("toolkit.spoken", "say how spoken the text of data files is"),
    "compare": ("toolkit.report.command", "put finished runs side by side, or write one run's report again"),
    "sync": ("toolkit.trackers.send", "send what wandb wrote offline into runs"),
    "export": ("toolkit.export", "write a run as a plain model, or send it to a hub"),
    "serve": ("toolkit.__main__", "serve runs over HTTP with a chat page"),
}
LATER: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`maltu serve` hands everything to `python -m serve`."""
    parser.add_argument("rest", nargs=argparse.REMAINDER)


def serve(arguments: argparse.Namespace) -> int:
    """Become `python -m serve`, so that serving never loads what trains and signals reach it."""
    import os
    import subprocess

    command = [sys.executable, "-m", "serve", *arguments.rest]
    if os.name == "posix":
        os.execv(sys.executable, command)
    return subprocess.run(command, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Find the verb, load its room, call it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="maltu", description="Make a small language model talk the way you want.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    named, asked = argv[0] if argv else "", parser
    for verb, (module, says) in VERBS.items():
        own = verbs.add_parser(verb, help=says, description=says, add_help=verb != "serve")
        if verb == named:  # only the room that is asked for is opened
            importlib.import_module(module).add_arguments(own)
            asked = own
    if named in LATER:
        parser.error(f"{named}: not in this version")
    if named == "serve":
        return report(serve, argparse.Namespace(rest=argv[1:]))
    if asked is parser:
        parser.parse_args(argv)  # --help, or an error that lists the verbs
    arguments = asked.parse_intermixed_args(argv[1:])  # key=value may stand after options too
    return report(getattr(importlib.import_module(VERBS[named][0]), named), arguments)


if __name__ == "__main__":
    sys.exit(main())
