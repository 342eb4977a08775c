"""`check RECIPE`: say what a recipe would do, before it does it."""

import argparse

from toolkit.recipe.read import read_recipe
from toolkit.shipped import resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """check RECIPE [key=value …]."""
    parser.add_argument("recipe", help="a recipe (YAML), or maltu:recipes/NAME.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="change one key of the recipe")


def check(arguments: argparse.Namespace) -> int:
    """Read the recipe first, so that a mistake in it is told at once; then look at base and data."""
    recipe = read_recipe(resolve(arguments.recipe), arguments.overrides)
    from toolkit.quiet import quiet

    with quiet():
        from rich.console import Console

        from toolkit.fit.preview import preview

        console = Console(highlight=False)
        seen = preview(recipe, console)
        if recipe.search is not None and seen is not None:
            from toolkit.search.outlook import show_outlook

            show_outlook(recipe, seen, console)
    return 0
