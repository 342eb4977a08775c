"""Recipes broken at random: the answer is a recipe or a RecipeError, never anything else."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from toolkit.errors import RecipeError
from toolkit.recipe.read import read_recipe
from toolkit.recipe.show import to_yaml
from toolkit.recipe.tree import RecipeDumper
from toolkit.recipe.words import NO_KEY, PLACE_OF

ROOT = Path(__file__).parents[2]
JUNK: tuple[Any, ...] = (
    None, True, 3, -1, 2.5, "", "x", "auto", "all", "2x", "lora", [], {}, [1], ["a", None], "~", {"kind": "prefix"},
    {"kind": None}, {"new": {}}, {"kind": [1]}, {"a": {"b": [{}]}}, float("inf"), 10**30, "말투", [[[]]],
    {"model": "x"}, "~nobody/x", {"kind": "ia3", "options": {"target_modules": 3}}, "maltu:", "maltu:../..", "\t",
    "hub:", "a" * 5000, {"kind": "<peft>"}, {1: 2}, "./", "a\nb", "{text}",
)  # fmt: skip
KEYS = (
    *PLACE_OF, *NO_KEY, "<word>", "<lora>", "search", "experts", "combine", "run", "x" * 300, "kind", "rank", "packing",
    "키",
)  # fmt: skip


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*at, key)
        yield from paths(inner, (*at, key))


def break_once(values: dict[str, Any], chance: random.Random) -> None:
    path = chance.choice(list(paths(values)))
    around: Any = values
    for part in path[:-1]:
        around = around[part]
    how = chance.choice(("replace", "replace", "remove", "add"))
    if how == "replace":
        around[path[-1]] = copy.deepcopy(chance.choice(JUNK))
    elif how == "remove":
        del around[path[-1]]
    elif isinstance(around, dict):
        around[chance.choice(KEYS)] = copy.deepcopy(chance.choice(JUNK))


@pytest.mark.parametrize(
    "name",
    ["voice_classify", "polite_prefix", "compare_kinds", "tone_mix", "vote_bases", "templates/spoken_mini"],
)
def test_a_broken_recipe_is_a_recipe_or_a_recipe_error(name: str, tmp_path: Path) -> None:
    chance = random.Random(name)
    whole = yaml.safe_load(to_yaml(read_recipe(ROOT / "recipes" / f"{name}.yaml", to_run=False)))
    file, n_refused = tmp_path / "r.yaml", 0
    for _ in range(60):
        values = copy.deepcopy(whole)
        for _ in range(chance.choice((1, 1, 2, 4))):
            break_once(values, chance)
        file.write_text(yaml.dump(values, Dumper=RecipeDumper, allow_unicode=True, sort_keys=False), encoding="utf-8")
        try:
            read_recipe(file)
        except RecipeError as error:
            n_refused += 1
            assert all(problem.says for problem in error.problems)
    assert n_refused > 20


def test_broken_bytes_are_a_recipe_or_a_recipe_error(tmp_path: Path) -> None:
    chance = random.Random(0)
    whole = (ROOT / "recipes" / "rewrite_spoken.yaml").read_bytes()
    file, n_refused = tmp_path / "r.yaml", 0
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(raw))
            raw[place : place + chance.randint(0, 3)] = bytes(
                chance.choices(b"\t\n\r :-{}[]&*!?|>'\"%@`#,\x00\x85\xff\xeda1", k=2)
            )
        file.write_bytes(raw)
        try:
            read_recipe(file)
        except RecipeError:
            n_refused += 1
    assert n_refused > 20
