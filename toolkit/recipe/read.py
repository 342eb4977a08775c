"""A recipe file in, a Recipe out; or one RecipeError with everything that is wrong, each with its line and remedy."""

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolkit.errors import Problem, RecipeError
from toolkit.recipe.candidates import Candidates, refusal
from toolkit.recipe.experts import names_files
from toolkit.recipe.explain import explain
from toolkit.recipe.model import Recipe
from toolkit.recipe.override import lay_over
from toolkit.recipe.sense import Clash, clashes
from toolkit.recipe.sense_combine import misfits_of_combine
from toolkit.recipe.sense_experts import misfits_of_experts
from toolkit.recipe.sense_space import misfits
from toolkit.recipe.space import Range
from toolkit.recipe.tree import Key, Tree, parse, parts_of, read_text
from toolkit.recipe.world import lacks
from toolkit.shipped import resolve

MOST_PROBLEMS = 50
MOST_PASSES = 4
RECIPE_FILE, RUN_FILE = "recipe.yaml", "run.json"  # of a run
SECTIONS: tuple[Key, ...] = (
    ("base",),
    ("data",),
    ("data", "clean"),
    ("adapter",),
    ("train",),
    ("evaluate",),
    ("serve",),
)
# Keys that tell which alternative their section is.
ALTERNATIVES = (("adapter", "kind"), ("base", "new"), ("base", "candidates"), ("combine", "kind"))
# Stands in for what is missing or wrong while the rest is looked at.
STAND_IN: dict[Key, Any] = {
    ("name",): "unnamed",
    ("base",): {"model": "spoken-mini"},
    ("base", "model"): "spoken-mini",
    ("data",): {"train": ["unnamed.jsonl"]},
    ("data", "train"): ["unnamed.jsonl"],
    ("experts",): {"unnamed": {}},
    ("search", "space"): {"train.learning_rate": [0.001]},
}


def read_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    to_run: bool = True,
    to_choose: bool = False,
    runs: Path | None = None,
) -> Recipe:
    """The recipe in a file (or `maltu:recipes/NAME.yaml`), with `key=value` overrides laid over it.

    `to_run=False` leaves out what depends on this machine (files there, packages installed): for the recipe of a
    run that is over, wherever its folder lies now. `to_choose` takes a recipe that names several bases. `runs`: where
    runs lie; where one of this name is finished, the runs that its experts were may be gone, for it holds them. Raises
    RecipeError with every problem at once. Loads no torch.
    """
    source = str(path)
    tree = parse(read_text(resolve(path), source), source)
    lay_over(tree, overrides)
    if () in tree.spoiled:
        raise RecipeError(source, tree.problems)
    recipe, found = check(tree, to_run, _finished(runs, tree.values.get("name")))
    if recipe is not None and isinstance(recipe.base, Candidates) and not to_choose:
        found.append(tree.problem(("base", "candidates"), refusal(source)))
    problems = sorted([*tree.problems, *found], key=_by_place)
    if len(problems) > MOST_PROBLEMS:
        problems = [*problems[:MOST_PROBLEMS], Problem("", f"and {len(problems) - MOST_PROBLEMS} more")]
    if problems or recipe is None:
        raise RecipeError(source, problems)
    return recipe


def check(tree: Tree, to_run: bool, finished: Path | None = None) -> tuple[Recipe | None, list[Problem]]:
    """The recipe of a tree and what is wrong with it. Wrong values stand aside while the others are compared.

    finished: the folder of a run of this name that is finished.
    """
    values, spoiled = copy.deepcopy(tree.values), {_whole(key) for key in tree.spoiled}
    _leave_out_empty_sections(values)
    _take_talk_of_experts(values, finished)
    for key in sorted(spoiled, key=len):
        _stand_in(values, key)
    problems: list[Problem] = []
    for _ in range(MOST_PASSES):
        try:
            recipe = Recipe.model_validate(values)
        except ValidationError as error:
            for one in explain(error.errors(include_url=False)[: 2 * MOST_PROBLEMS]):
                if not one.is_silent:
                    problems.append(tree.problem(one.key, one.says))
                meant = tuple(one.meant.split(".")) if one.meant else one.key
                spoiled |= {_whole(one.key), _whole(one.key) if meant in tree.places else meant}
                at = one.key if one.is_unknown and one.key in ALTERNATIVES else _whole(one.key)
                _stand_in(values, at, is_unknown=one.is_unknown)
            if error.error_count() > MOST_PROBLEMS:
                break
        else:
            of_many = (*misfits_of_experts(recipe), *misfits_of_combine(recipe))
            against = [*clashes(recipe), *misfits(recipe), *of_many, *(lacks(recipe, finished) if to_run else ())]
            sound = [one for one in against if _is_sound(one, spoiled)]
            return recipe, problems + [tree.problem(parts_of(one.at), one.says) for one in sound]
    return None, problems


def _leave_out_empty_sections(values: dict[str, Any]) -> None:
    """A section whose keys are all commented out is null: it has its defaults."""
    for *around, name in SECTIONS:
        section: Any = values
        for part in around:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section and section[name] is None:
            del section[name]


def _finished(runs: Path | None, name: object) -> Path | None:
    """The folder of a run of this name, where it is finished."""
    if runs is None or not isinstance(name, str):
        return None
    try:
        told = json.loads((runs / name / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return runs / name if isinstance(told, dict) and told.get("status") == "finished" else None


def _take_talk_of_experts(values: dict[str, Any], finished: Path | None) -> None:
    """Without data.train, where every expert that is trained names its own files, all of them are the recipe's; where
    all are runs that exist, those files that they learned from and that are here, or were when the run was finished.
    """
    experts, data = values.get("experts"), values.get("data", {})
    if not isinstance(experts, dict) or not isinstance(data, dict) or "train" in data:
        return
    own = [one for one in experts.values() if not (isinstance(one, dict) and "run" in one)]
    if experts and not own:
        gone = finished is not None and not all(
            os.path.isfile(os.path.join(str(one["run"]), RUN_FILE)) for one in experts.values()
        )
        named = [str(finished)] if gone else [one["run"] for one in experts.values()]
        learned = [name for run in named for name in _learned_by(run)]
        values["data"] = {**data, **({"train": [*dict.fromkeys(learned)]} if learned else {})}
    if own and all(isinstance(one, dict) and names_files(one) for one in own):
        lists = [one["data"]["train"] for one in own if isinstance(one["data"]["train"], list)]
        names = [file.get("path") if isinstance(file, dict) else file for files in lists for file in files]
        sound = dict.fromkeys(name for name in names if isinstance(name, str) and name)
        values["data"] = {**data, "train": [*sound] or ["unnamed.jsonl"]}  # none is sound: each is complained about


def _learned_by(run: object) -> list[str]:
    """The files of data.train in a run's recipe that are here; of a run that is none, or cannot be read, none."""
    source = os.path.join(os.path.expanduser(run if isinstance(run, str) else ""), RECIPE_FILE)
    if not isinstance(run, str) or not os.path.isfile(source):
        return []
    try:
        values: Any = parse(read_text(Path(source), source), source).values
    except RecipeError:
        return []  # told of the run when it is opened
    data = values.get("data")
    files = data.get("train") if isinstance(data, dict) else None
    listed = files if isinstance(files, list) else []
    named = [file.get("path") if isinstance(file, dict) else file for file in listed]
    return [
        name for name in named if isinstance(name, str) and (name.startswith("hub:") or os.path.isfile(resolve(name)))
    ]


def _whole(key: Key) -> Key:
    """The smallest part of a recipe that makes sense without the value at `key`: the list around an item, the union."""
    key = next((key[:depth] for depth, part in enumerate(key) if isinstance(part, int)), key)
    if key[:2] == ("data", "format"):
        return key[:2]
    if key[:2] == ("search", "space"):
        is_of_kinds = key[2:3] == ("adapter",) and key[3:4] and key[3] not in Range.model_fields
        return key[:5] if is_of_kinds else key[:3]
    return key[:1] if key in ALTERNATIVES else key


def _stand_in(values: dict[str, Any], key: Key, *, is_unknown: bool = False) -> None:
    section: Any = values
    for part in key[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        return
    if key in STAND_IN and not is_unknown:
        section[str(key[-1])] = copy.deepcopy(STAND_IN[key])
    else:
        section.pop(key[-1], None)
        if section == {} and key[:-1] in STAND_IN:
            section.update(copy.deepcopy(STAND_IN[key[:-1]]))


def _is_sound(clash: Clash, spoiled: set[Key]) -> bool:
    """Whether nothing that the clash hangs on was wrong by itself; what was is complained about once."""
    for at in (clash.at, *clash.needs):
        key = parts_of(at)
        if any(key[: len(one)] == one or one[: len(key)] == key for one in spoiled):
            return False
    return True


def _by_place(problem: Problem) -> tuple[bool, int]:
    return problem.where.startswith("override "), problem.line or 0
