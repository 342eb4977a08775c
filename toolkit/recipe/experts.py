"""The experts of a recipe: what each of them has of its own laid over what all share, and the talk of all of them."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from toolkit.errors import Problem, RecipeError
from toolkit.recipe.adapter import Lora
from toolkit.recipe.combine import Vote
from toolkit.recipe.explain import explain
from toolkit.recipe.model import Recipe
from toolkit.recipe.tree import dotted

SECTIONS = ("data", "adapter", "train", "base")  # that an expert may say something about
BASES = ("model", "new")
STACKED = ("lora", "prefix", "reft", "embedding")  # kinds that stand side by side on one base


def expert_recipes(recipe: Recipe) -> dict[str, Recipe | str]:
    """For each expert, in the order written, the whole recipe that trains it alone; or the folder after `run:`.

    Such a recipe has the name of the whole one, and neither experts nor combine. Maps are merged key by key, lists
    replace; another kind of adapter replaces its section, and so does a base that is named or made. Empty without
    experts. Raises: RecipeError, as reading a recipe does, for one that is none.
    """
    found: dict[str, Recipe | str] = {}
    for name, own in (recipe.experts or {}).items():
        if "run" in own:
            found[name] = str(own["run"])
            continue
        try:
            found[name] = Recipe.model_validate(laid_over(recipe, own))
        except ValidationError as error:
            wrong = explain(error.errors(include_url=False))
            problems = [Problem(dotted(("experts", name, *one.key)), one.says) for one in wrong]
            raise RecipeError(recipe.name, problems) from None
    return found


def files_of(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """The files that each expert learns from; of one that exists already (`run:`) none."""
    return {name: () if isinstance(one, str) else one.data.train_files for name, one in expert_recipes(recipe).items()}


def union(recipe: Recipe) -> Recipe:
    """The recipe with the talk of all its experts in data.train: every file once, in order, without weights.

    It is gathered and split once, so that no expert learns what another is judged by. Each expert names its own files
    in it, so its experts are those of the recipe. A recipe of which nothing is trained, or without experts, is itself.
    """
    own_files = files_of(recipe)
    files = tuple(dict.fromkeys(name for names in own_files.values() for name in names))
    if recipe.experts is None or not files:
        return recipe
    shared = recipe.model_dump(mode="python", include={"data": {"train"}})["data"]["train"]
    experts = {
        name: own if "run" in own or names_files(own) else {**own, "data": {"train": list(shared)}}
        for name, own in recipe.experts.items()
    }
    data = recipe.data.model_copy(update={"train": files})
    return recipe.model_copy(update={"data": data, "experts": experts})


def stands_alone(recipe: Recipe, expert: Recipe) -> bool:
    """Whether a member of a vote is a run of its own: on another base than the others, or what no stack holds."""
    return isinstance(recipe.combine, Vote) and (expert.base != recipe.base or not is_stacked(expert))


def is_stacked(expert: Recipe) -> bool:
    """Whether the adapter that is learned stands beside others on one base.

    How it learns is another question (fit/stackable.py): a PiSSA start, a projection and checkpointing want a base to
    themselves, and leave a plain adapter.
    """
    dora = isinstance(expert.adapter, Lora) and expert.adapter.dora
    return expert.adapter.kind in STACKED and not dora


def trained(recipe: Recipe) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The experts that a run trains, and what each has of its own."""
    return ((name, own) for name, own in (recipe.experts or {}).items() if "run" not in own)


def names_files(own: Mapping[str, Any]) -> bool:
    """Whether an expert learns from files of its own."""
    return isinstance(own.get("data"), dict) and "train" in own["data"]


def laid_over(recipe: Recipe, own: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of an expert's recipe; nothing is checked."""
    tree: dict[str, Any] = recipe.model_dump(mode="python", exclude={"search", "experts", "combine"})
    for section in SECTIONS:
        given = own.get(section)
        if given is None:
            continue
        old = tree[section]
        is_other = isinstance(given, dict) and (
            (section == "adapter" and given.get("kind", old["kind"]) != old["kind"])
            or (section == "base" and any(key in given for key in BASES))
        )
        tree[section] = given if is_other or not isinstance(given, dict) else _merged(old, given)
    return tree


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {key for key in new if isinstance(new[key], dict) and isinstance(old.get(key), dict)}
    return {**old, **{key: _merged(old[key], value) if key in both else value for key, value in new.items()}}
