"""`key=value` from the command line, laid over a recipe's tree: the value is YAML, the key is dotted.

Maps merge key by key, lists replace, and a new kind replaces its section; a section that is missing or null is made.
A search space is one thing, and so is each of its ranges: what is given for it replaces it whole.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from toolkit.errors import Problem, RecipeError
from toolkit.recipe.adapter import KINDS, PEFT_KINDS
from toolkit.recipe.candidates import BASES
from toolkit.recipe.space import Range
from toolkit.recipe.tree import Key, Place, Tree, compose, plant

SPACE = ("search", "space")
SECRET = re.compile(r"(://[^:/@\s]*):[^\s'\"]*@")  # the password in an address


def lay_over(tree: Tree, overrides: Sequence[str]) -> None:
    """Put every override into the tree, kinds first; what cannot be read as one becomes a problem of the tree."""
    for text in sorted(overrides, key=_order):
        shown = SECRET.sub(r"\1:***@", text)
        shown = shown if len(shown) <= 70 else shown[:67] + "…"
        key = _key_of(text)
        if key is None:
            says = "must be key=value, as in train.epochs=1 or adapter.kind=prefix"
            tree.problems.append(Problem(f"override {shown}", says))
            continue
        try:
            node = compose(text.partition("=")[2], "")
        except RecipeError as error:
            tree.problems.append(Problem(f"override {shown}", error.problems[0].says))
            tree.spoiled.add(key)
            continue
        new = Tree(places={key[:depth]: Place(override=shown) for depth in range(1, len(key) + 1)})
        value = None if node is None else plant(new, key, node, shown)
        for part in reversed(key):
            value = {part: value}
        if key[:2] == SPACE:
            _clear(tree.values, key)
        tree.problems += new.problems
        tree.spoiled |= new.spoiled
        _merge(tree, new, (), tree.values, value)


def _order(text: str) -> int:
    """Sections that bring a kind, then kinds, then all else as it was given: a kind replaces the keys of another."""
    name, _, value = text.partition("=")
    brings_kind = value.lstrip().startswith("{") and "kind" in value
    return 0 if brings_kind else 1 if name.strip().endswith(".kind") else 2


def _key_of(text: str) -> Key | None:
    name, equals, _ = text.partition("=")
    parts = tuple(name.strip().split("."))
    if parts[:1] == ("experts",) or parts[:2] == ("combine", "weights"):  # names that are read in NFC
        parts = tuple(unicodedata.normalize("NFC", part) for part in parts)
    is_key = equals and all(parts) and not any(part != part.strip() for part in parts)
    return (_in_space(parts) if parts[:2] == SPACE else parts) if is_key else None


def _in_space(parts: tuple[str, ...]) -> Key:
    """The key of a search space that `search.space.train.learning_rate.low` means: its own keys hold dots."""
    has_kind = parts[2:3] == ("adapter",) and len(parts) > 3 and parts[3] in {*KINDS, *PEFT_KINDS}
    head = parts[: 4 if has_kind else 2]
    name = parts[len(head) :]
    n_after = int(len(name) > 1 and name[-1] in Range.model_fields)
    joined = ".".join(name[: len(name) - n_after])
    return (*head, *([joined] if joined else []), *name[len(name) - n_after :])


def _clear(values: Any, key: Key) -> None:
    """Take out what an override of a search space replaces."""
    for part in key[:-1]:
        values = values.get(part) if isinstance(values, dict) else None
    if isinstance(values, dict):
        values.pop(key[-1], None)


def _merge(tree: Tree, new: Tree, at: Key, into: dict[str, Any], values: Any) -> None:
    for name, value in values.items():
        key, old = (*at, name), into.get(name)
        if isinstance(old, dict) and isinstance(value, dict) and not _replaces(key, old, value, tree.values):
            _merge(tree, new, key, old, value)
            continue
        into[name] = value
        for place in [place for place in tree.places if place[: len(key)] == key]:
            del tree.places[place]
        tree.places |= {place: where for place, where in new.places.items() if place[: len(key)] == key}


def _replaces(key: Key, old: dict[str, Any], value: dict[str, Any], recipe: dict[str, Any]) -> bool:
    """Whether the new map is another alternative of its section, so that the old keys mean nothing in it."""
    of_expert = key[2:] if key[:1] == ("experts",) else None
    if of_expert == ():
        return ("run" in value) != ("run" in old)
    if ("base",) in (key, of_expert):
        of_old, of_value = BASES & {*old}, BASES & {*value}
        return bool(of_old and of_value) and of_old != of_value
    usual = "lora" if ("adapter",) in (key, of_expert) else None
    if of_expert == ("adapter",) and isinstance(recipe.get("adapter"), dict):
        usual = recipe["adapter"].get("kind", usual)
    return "kind" in value and value["kind"] != old.get("kind", usual)
