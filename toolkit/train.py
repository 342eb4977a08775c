"""The command that trains: a recipe in, a run folder out.

python -m toolkit.train RECIPE [key=value …] [--runs runs] [--fresh] [--quiet]
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from toolkit.errors import MaltuError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `train`, for this command and for `maltu train` alike."""
    parser.add_argument("recipe", help="a recipe (YAML), or maltu:recipes/NAME.yaml for one that ships")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="change a key: train.epochs=5")
    parser.add_argument("--runs", default="runs", type=Path, help="where run folders lie (default: runs)")
    parser.add_argument("--fresh", action="store_true", help="move an existing run to RUNS/.old and start anew")
    parser.add_argument("--quiet", action="store_true", help="say errors only")


def train(arguments: argparse.Namespace) -> int:
    """Read the recipe (half a second, before anything heavy loads), then run it. Returns the exit code."""
    from toolkit.recipe.read import read_recipe
    from toolkit.shipped import resolve

    recipe = read_recipe(resolve(arguments.recipe), arguments.overrides, runs=arguments.runs)
    from toolkit.pages import keep_pages
    from toolkit.quiet import quiet

    keep_pages()
    with quiet():  # some libraries talk while they are imported
        from toolkit.steps import Options

        if recipe.search is not None:
            from toolkit.searching import run
        elif recipe.experts is not None or recipe.combine is not None:
            from toolkit.combining import run
        else:
            from toolkit.pipeline import run

    command = shlex.join([arguments.recipe, *arguments.overrides])
    return run(recipe, Options(runs=arguments.runs, fresh=arguments.fresh, quiet=arguments.quiet, command=command))


def report(call: object, arguments: argparse.Namespace) -> int:
    """Call a verb; an error of ours is printed without a traceback and becomes its exit code, Ctrl-C becomes 130."""
    assert callable(call)
    try:
        return int(call(arguments) or 0)
    except MaltuError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        is_training = call is train
        sys.stderr.write("Interrupted." + (" The same command goes on where it stopped.\n" if is_training else "\n"))
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m toolkit.train", description="Train what a recipe says.")
    add_arguments(parser)
    return report(train, parser.parse_intermixed_args(argv))


if __name__ == "__main__":
    sys.exit(main())
