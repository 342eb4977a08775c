"""`check RECIPE`: say what a recipe would do, before it does it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from toolkit.recipe.combine import MAKES_MEMBERS, Bag, Boost, Combine, Vote, how_of, set_by_hand
from toolkit.recipe.experts import expert_recipes, stands_alone, union
from toolkit.recipe.model import Base, Recipe
from toolkit.recipe.read import read_recipe
from toolkit.recipe.tree import dotted
from toolkit.shipped import resolve

if TYPE_CHECKING:
    from rich.console import Console

    from toolkit.combine.methods import Method
    from toolkit.fit.preview import Previewed


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
        seen = preview(union(recipe), console)
        if seen is not None and (recipe.experts is not None or recipe.combine is not None):
            show_many(recipe, seen, console)
        if recipe.search is not None and seen is not None:
            from toolkit.search.outlook import show_outlook

            show_outlook(recipe, seen, console)
    return 0


def show_many(recipe: Recipe, seen: Previewed, console: Console) -> None:
    """Print what each expert learns and costs by itself, and how they are combined, below the preview of all talk."""
    from rich.table import Table
    from rich.text import Text

    if recipe.experts is not None:
        console.rule("experts")
        table = Table()
        for column in ("expert", "adapter", "differs in", "rows", "steps", "time alone, estimated"):
            table.add_column(column, justify="right" if column in ("rows", "steps") else "left", overflow="fold")
        for row in _experts(recipe, seen):
            table.add_row(*map(Text, row))
        console.print(table)
    if recipe.combine is not None:
        console.rule("how they are combined")
        for name, value in _combination(recipe, recipe.combine):
            console.print(f"{name:<24}{value}", markup=False, soft_wrap=True)


def _experts(recipe: Recipe, seen: Previewed) -> Iterator[tuple[str, ...]]:
    for name, one in expert_recipes(recipe).items():
        own = (recipe.experts or {})[name]
        if isinstance(one, str):
            yield name, f"of {one}", "", "", "", "is there"
        elif one.base != recipe.base:
            base = one.base.model if isinstance(one.base, Base) else "a base from scratch"
            yield name, one.adapter.kind, ", ".join(_keys(own)), "", "", f"a run of its own, on {base}"
        else:
            n_rows, steps, time = _cost(recipe, one, seen)
            alone = ", a run of its own" if stands_alone(recipe, one) else ""
            yield name, one.adapter.kind, ", ".join(_keys(own)), f"{n_rows:,}", steps, f"{time}{alone}"


def _cost(recipe: Recipe, one: Recipe, seen: Previewed) -> tuple[int, str, str]:
    """Rows to learn from, steps and time of one expert."""
    from dataclasses import replace

    from toolkit.fit.plan import make_plan
    from toolkit.fit.preview import estimate

    files, own = union(recipe).data.train_files, one.data.train_files
    kept = [i for i, place in enumerate(seen.rows.entry) if files[place] in own]
    entry = [own.index(files[seen.rows.entry[i]]) for i in kept]
    rows = replace(seen.rows, train=[seen.rows.train[i] for i in kept], entry=entry)
    if not kept:
        return 0, "", "no talk is left of its files"
    plan = make_plan(one, seen.shape, seen.place, max(len(row.input_ids) for row in rows.train))
    told = estimate(one, plan, seen.shape, rows, seen.place.device)
    return len(kept), told["steps"].split()[0], told["time, estimated"].partition(" of training")[0]


def _keys(own: dict[str, object]) -> Iterator[str]:
    """The keys that an expert has of its own."""
    for section, given in own.items():
        yield from (dotted((section, key)) for key in given) if isinstance(given, dict) else (section,)


def _combination(recipe: Recipe, combine: Combine) -> Iterator[tuple[str, str]]:
    for key, value in set_by_hand(combine):
        weights = value.items() if isinstance(value, dict) else ()
        yield key, ", ".join(f"{name} {weight:g}" for name, weight in weights) or str(value)
    if combine.kind in MAKES_MEMBERS:
        most = combine.members if isinstance(combine, Bag) else combine.rounds if isinstance(combine, Boost) else 0
        yield "cost", f"{'at most ' * isinstance(combine, Boost)}{most} members, each as the run above"
    made, answers = _methods(recipe, combine)
    yield "what it does", made.says
    if answers is not made:
        yield "how it answers", answers.says
    yield "before it answers", made.training
    yield "an answer costs", answers.serving


def _methods(recipe: Recipe, combine: Combine) -> tuple[Method, Method]:
    """How the combination is made, and how it answers: a bag's members are made first, and then vote.

    Members that vote on text average every token, or the majority's answer is taken (hard).
    """
    from toolkit.combine.methods import method_named

    how, is_labels = how_of(combine), recipe.task == "classify"
    if isinstance(combine, Vote | Bag):
        of_text = ("vote", "majority") if how == "hard" else ("mix", how.replace("soft", "prob"))
        answers = method_named(*(("vote", how) if is_labels else of_text))
        if isinstance(combine, Vote):
            return answers, answers
        return method_named("bag", "bootstrap" if combine.bootstrap else "seeds"), answers
    if isinstance(combine, Boost) and not is_labels:
        how = "likelihood"
    made = method_named(str(combine.kind), how)
    return made, made
