"""`choose RECIPE`: compare the bases that a recipe names, and print the command that trains on the best of them.

A result by candidate lies in RUNS/NAME-choose, so that the same command goes on after a kill; leaderboard.md and
leaderboard.json there hold everything that was found.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

from toolkit.errors import InputError, Problem, RecipeError

INTERRUPTED = 130
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmb]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `choose`."""
    parser.add_argument("recipe", help="a recipe with base: {candidates: [spoken-mini, owner/name, ./mine]}")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="change one key of the recipe")
    parser.add_argument("--runs", default="runs", type=Path, help="the result lies in RUNS/NAME-choose (default: runs)")
    parser.add_argument(
        "--table", type=Path, metavar="FILE.csv", help="figures of others, shown beside: model,benchmark,score"
    )
    parser.add_argument(
        "--licence",
        action="append",
        default=[],
        metavar="NAME",
        help="only bases under this licence, or `commercial`; several: one of them",
    )
    parser.add_argument(
        "--language", action="append", default=[], metavar="CODE", help="only bases that speak it; several: all of them"
    )
    parser.add_argument("--max-parameters", metavar="N", help="only bases of at most so many weights: 600m, 3b")
    parser.add_argument("--quiet", action="store_true", help="say errors only")


def choose(arguments: argparse.Namespace) -> int:
    """Read the recipe (before anything heavy loads), then compare its candidates. Returns the exit code."""
    from toolkit.recipe.candidates import Candidates
    from toolkit.recipe.read import read_recipe
    from toolkit.shipped import resolve

    most = None if arguments.max_parameters is None else size_of(arguments.max_parameters)
    recipe = read_recipe(resolve(arguments.recipe), arguments.overrides, to_choose=True)
    if not isinstance(recipe.base, Candidates):
        says = "names one base, so there is nothing to choose. Write base: {candidates: [spoken-mini, ./mine]}"
        raise RecipeError(arguments.recipe, [Problem("base", says)])
    from toolkit.quiet import quiet

    with quiet():  # some libraries talk while they are imported
        from toolkit.choose.about import Filters
        from toolkit.choose.run import Options, run

        filters = Filters(tuple(arguments.licence), tuple(arguments.language), most)
        command = shlex.join([arguments.recipe, *arguments.overrides])
        options = Options(arguments.runs, filters, arguments.table, arguments.quiet, command)
        try:
            return run(recipe, options)
        except KeyboardInterrupt:
            sys.stderr.write("Interrupted. The same command goes on with the candidates that are left.\n")
            return INTERRUPTED


def size_of(text: str) -> int:
    """A number of weights as people write it: 600m, 3b, 1.5B, 5310720. Raises InputError for anything else."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        says = f"{text!r} is no number of weights. Write 600m, 1.5b or 5310720"
        raise InputError("choose", [Problem("--max-parameters", says)])
    return int(float(found[1]) * _UNITS[found[2].lower()])
