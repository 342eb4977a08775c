"""What the experts of a recipe cannot mean: what all of them share, talk that nobody learns, two that are the same."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from toolkit.recipe.adapter import Full
from toolkit.recipe.combine import Vote
from toolkit.recipe.experts import (
    SECTIONS,
    STACKED,
    is_stacked,
    laid_over,
    names_files,
    stands_alone,
    trained,
)
from toolkit.recipe.explain import explain, shown
from toolkit.recipe.model import Data, Expert, NewBase, Recipe
from toolkit.recipe.sense import Clash, clashes
from toolkit.recipe.tree import Key, dotted, parts_of
from toolkit.recipe.unknown import unknown_key

SPLIT_ONCE = "all their talk is read, cleaned and split once, so that none learns what another is judged by"
ONE_PASS = "they learn side by side, in one pass through the base"
ONE_RENDERING = "all their talk is rendered once, so that all are judged on the same tokens"
NOT_OWN: Mapping[str, str] = {
    "name": "a run has one name, and an expert is called by its key", "task": "experts of one run do one task",
    "evaluate": "all are judged alike", "track": "a run has one place for its numbers",
    "serve": "a run is served with one set of defaults", "search": "search one adapter first, then combine",
    "experts": "an expert has no experts", "combine": "an expert has no experts to combine",
    "base": "they stand on one base, and only combine: {kind: vote} joins several", "data": SPLIT_ONCE,
    "train.precision": ONE_PASS, "train.packing": ONE_PASS, "train.micro_batch": ONE_PASS,
    "train.max_length": ONE_RENDERING,
    "train.activation_checkpointing": ONE_PASS, "train.keep": "checkpoints of single experts are not kept",
}  # fmt: skip


def misfits_of_experts(recipe: Recipe) -> Iterator[Clash]:
    """Everything that is wrong with the experts of a recipe whose sections are right one by one."""
    if recipe.experts is None:
        return
    for name, overrides in recipe.experts.items():
        yield from _runs(name, overrides)
    names: dict[str, str] = {}
    for name in recipe.experts:
        first = names.setdefault(name.casefold(), name)
        if first != name:
            says = f"differs from '{first}' in capitals alone, and both are folders. Choose another name"
            yield Clash(("experts", name), says)
    for name, own in trained(recipe):
        yield from _own(recipe, name, own)
    yield from _unlearned(recipe)
    yield from _alike(recipe)


def sound(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of the experts that are trained, as far as they are right."""
    found = {}
    for name, own in trained(recipe):
        try:
            found[name] = Recipe.model_validate(laid_over(recipe, _allowed(recipe, own)))
        except ValidationError:
            continue  # complained about
    return found


def called(expert: Recipe) -> str:
    """What an expert learns, as complaints have it."""
    return f"{expert.adapter.kind}{' with DoRA' if getattr(expert.adapter, 'dora', False) else ''}"


def instead(recipe: Recipe) -> str:
    """What helps where an adapter cannot stand beside others."""
    kinds = f"Choose {', '.join(STACKED[:-1])} or {STACKED[-1]}, without DoRA"
    return f"{kinds}, or combine by vote" if recipe.task == "classify" and recipe.experts else kinds


def moved(name: str, own: Mapping[str, Any], clash: Clash) -> Clash:
    """A contradiction in an expert's recipe, told at the key that the expert wrote."""
    keys = [parts_of(at) for at in (clash.at, *clash.needs)]
    at = next((key for key in keys if _is_written(own, key)), None)
    says = clash.says if at == keys[0] else f"with this, {dotted(keys[0])}: {clash.says}"
    needs = (*keys, *(("experts", name, *key) for key in keys))
    return Clash(("experts", name, *(at or ())), says, needs)


def _runs(name: str, own: Mapping[str, Any]) -> Iterator[Clash]:
    if "run" not in own:
        return
    for key in own:
        if key != "run":
            says = "stands beside run, and a run that exists is taken as it is. Remove one of them"
            yield Clash(("experts", name, key), says)
    if not isinstance(own["run"], str) or not own["run"]:
        says = f"must be the folder of a run, as in runs/polite, not {shown(own['run'])}"
        yield Clash(("experts", name, "run"), says)


def _own(recipe: Recipe, name: str, own: Mapping[str, Any]) -> Iterator[Clash]:
    place: Key = ("experts", name)
    for key in _not_allowed(recipe, own):
        yield Clash((*place, *key), _why_not(key), ("combine",) if key == ("base",) else ())
    try:
        made = Recipe.model_validate(laid_over(recipe, _allowed(recipe, own)))
    except ValidationError as error:
        for one in explain(error.errors(include_url=False)):
            if not one.is_silent:
                needs = ("adapter.kind",) if one.key[0] == "adapter" else ()
                yield Clash((*place, *one.key), one.says, needs)
        return
    if isinstance(recipe.base, NewBase):
        return  # no experts stand on it: told once, of the base
    before = {one.at for one in clashes(recipe)}
    yield from (moved(name, own, one) for one in clashes(made) if one.at not in before)
    if isinstance(made.adapter, Full) and not stands_alone(recipe, made):
        says = f"full training changes the base itself, which the experts share. {instead(recipe)}"
        yield moved(name, own, Clash("adapter.kind", says, ("combine",)))
    elif recipe.combine is None and not is_stacked(made):  # what combines them says the rest itself
        says = f"experts stand side by side on one base, and {called(made)} cannot. {instead(recipe)}"
        at = "adapter.dora" if made.adapter.kind == "lora" else "adapter.kind"
        yield moved(name, own, Clash(at, says, ("combine", "adapter.kind")))


def _not_allowed(recipe: Recipe, own: Mapping[str, Any]) -> Iterator[Key]:
    """The keys that an expert has and may not have."""
    is_alone = isinstance(recipe.combine, Vote) and ("base" in own or not _looks_stacked(recipe, own))
    for section, given in own.items():
        if section not in SECTIONS or (section == "base" and not isinstance(recipe.combine, Vote)):
            yield (section,)
        elif isinstance(given, dict) and section == "data":
            yield from ((section, key) for key in given if key != "train")
        elif isinstance(given, dict) and section == "train" and not is_alone:
            yield from ((section, key) for key in given if f"train.{key}" in NOT_OWN)
        elif isinstance(given, dict) and section == "base" and "candidates" in given:
            yield (section, "candidates")


def _why_not(key: Key) -> str:
    name = dotted(key)
    if key == ("base", "candidates"):
        return "an expert stands on one base. Write model: NAME"
    is_known = key[0] in Recipe.model_fields and (len(key) == 1 or key[0] != "data" or key[1] in Data.model_fields)
    if not is_known:
        return unknown_key(key, Expert if len(key) == 1 else Data)[0]
    remedy = "Remove it" if key[0] in ("experts", "combine", "search", "name") else "Write it once, for all of them"
    return f"cannot differ between experts: {NOT_OWN.get(name, NOT_OWN.get(str(key[0]), ''))}. {remedy}"


def _allowed(recipe: Recipe, own: Mapping[str, Any]) -> dict[str, Any]:
    """What an expert has of its own without what it may not have."""
    refused = set(_not_allowed(recipe, own))
    kept: dict[str, Any] = {}
    for section, given in own.items():
        if (section,) in refused:
            continue
        is_map = isinstance(given, dict)
        kept[section] = {k: v for k, v in given.items() if (section, k) not in refused} if is_map else given
    return kept


def _looks_stacked(recipe: Recipe, own: Mapping[str, Any]) -> bool:
    """`is_stacked` of values that nobody has checked."""
    adapter = own.get("adapter")
    merged = laid_over(recipe, {"adapter": adapter if isinstance(adapter, dict) else None})["adapter"]
    return merged.get("kind", "lora") in STACKED and merged.get("dora") is not True


def _unlearned(recipe: Recipe) -> Iterator[Clash]:
    """Files of the recipe that no expert learns from, since each names its own."""
    own = [own for _, own in trained(recipe)]
    made = sound(recipe)
    if not own or len(made) < len(own) or not all(names_files(one) for one in own):
        return
    learned = {file for one in made.values() for file in one.data.train_files}
    unread = [file for file in recipe.data.train_files if file not in learned]
    weighted = any(weight != 1 for weight in recipe.data.train_weights)
    if unread or weighted:
        what = f"nobody learns from {', '.join(unread)}" if unread else "these weights are nobody's"
        says = f"every expert names its own files, so {what}. Remove data.train, or give it to an expert"
        yield Clash("data.train", says, ("experts",))


def _alike(recipe: Recipe) -> Iterator[Clash]:
    seen: list[tuple[str, Recipe]] = []
    made_of = sound(recipe)
    whole = {name for name, own in trained(recipe) if name in made_of and not any(_not_allowed(recipe, own))}
    for name, made in ((name, one) for name, one in made_of.items() if name in whole):
        same = next((first for first, one in seen if one == made), None)
        if same is not None:
            says = f"learns the same as {same}. Give it other data, another adapter, or another train.seed"
            yield Clash(("experts", name), says, (("experts", same),))
        seen.append((name, made))


def _is_written(own: Any, key: Key) -> bool:
    for part in key:
        inside = range(len(own)) if isinstance(own, list) else own if isinstance(own, dict) else ()
        if part not in inside:
            return False
        own = own[part]
    return True
