"""The space of a search as a list of dimensions, and the recipe of one trial."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from toolkit.errors import Problem, RecipeError
from toolkit.recipe.adapter import KINDS, PeftKind
from toolkit.recipe.explain import explain
from toolkit.recipe.model import Data, Recipe, Train, WeightedFile
from toolkit.recipe.section import Section
from toolkit.recipe.sense import clashes
from toolkit.recipe.space import Range, Search
from toolkit.recipe.tree import Key, dotted

__all__ = [
    "Dimension",
    "Range",
    "Search",
    "adapter_section",
    "dimensions",
    "types_of",
    "value_of",
    "with_values",
    "written",
]

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Dimension:
    """One thing that is searched.

    name: the parameter's name in a study, as in train.learning_rate, adapter.rank, adapter.kind; with a kind before a
    slash where it holds for that kind only, as in lora/rank and prefix/train.learning_rate.
    key: the dotted recipe key that it sets. values: a Range, or the choices. A range holds whole numbers exactly where
    its key does. when: the kind of adapter that it belongs to; None for all.
    """

    name: str
    key: str
    values: Range | tuple[Value, ...]
    when: str | None = None

    @property
    def place(self) -> Key:
        """Where it is written in the recipe."""
        if self.when is not None:
            return ("search", "space", "adapter", self.when, self.name.partition("/")[2])
        return ("search", "space", "adapter" if self.name == "adapter.kind" else self.name)


def dimensions(recipe: Recipe) -> tuple[Dimension, ...]:
    """The dimensions of the recipe's search in the order they are written; the kind stands before what hangs on it."""
    return tuple(_in_its_numbers(recipe, one) for one in written(recipe))


def written(recipe: Recipe) -> Iterator[Dimension]:
    """The dimensions as the user wrote them, whether or not they make sense; sense_space.py says which do not."""
    for key, values in (recipe.search.space if recipe.search else {}).items():
        if not isinstance(values, dict):
            if key not in ("adapter", "adapter.kind"):
                yield Dimension(key, key, values)
            continue
        if key != "adapter":
            continue
        yield Dimension("adapter.kind", "adapter.kind", tuple(values))
        for kind, inner in values.items():
            own = KINDS.get(kind, PeftKind).model_fields
            for name, of_kind in inner.items():
                is_own = "." not in name or name.partition(".")[0] in own
                yield Dimension(f"{kind}/{name}", f"adapter.{name}" if is_own else name, of_kind, kind)


def _in_its_numbers(recipe: Recipe, one: Dimension) -> Dimension:
    """Whole numbers of a range become numbers with a point where the key takes them."""
    values = one.values
    if not isinstance(values, Range) or float not in types_of(recipe, one):
        return one
    step = None if values.step is None else float(values.step)
    return replace(one, values=Range(low=float(values.low), high=float(values.high), log=values.log, step=step))


def types_of(recipe: Recipe, one: Dimension) -> frozenset[type]:
    """What the dimension's key may hold, of bool, int, float and str; empty where it is no key of a recipe."""
    section, _, name = one.key.partition(".")
    if section == "train":
        return _types(Train, name)
    if section == "adapter" and name.startswith("options."):
        given = one.values
        numbers = (given.low, given.high, given.step or 0) if isinstance(given, Range) else given
        return frozenset({int if all(isinstance(number, int) for number in numbers) else float})
    if section == "adapter":
        return frozenset({str}) if name == "kind" else _types(adapter_section(recipe, one.when), name)
    is_weight = one.key.startswith("data.train.") and one.key.endswith(".weight")
    return _types(WeightedFile, "weight") if is_weight else frozenset()


def adapter_section(recipe: Recipe, kind: str | None) -> type[Section]:
    """The section of a kind of adapter; of the recipe's own for None."""
    return type(recipe.adapter) if kind is None else KINDS.get(kind, PeftKind)


def _types(section: type[Section], name: str) -> frozenset[type]:
    field = section.model_fields.get(name)
    return frozenset() if field is None else frozenset(_plain_types(field.annotation))


def _plain_types(annotation: Any) -> Iterator[type]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _plain_types(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for inner in get_args(annotation):
            yield from _plain_types(inner)
    elif origin is Literal:
        yield from {type(word) for word in get_args(annotation)}
    elif annotation in (bool, int, float, str):
        yield annotation


def value_of(recipe: Recipe, key: str) -> Any:
    """The recipe's own value at a dotted key, or None where its sections have no such key."""
    parts = key.split(".")
    place = _file_of(parts, recipe.data)
    if place is not None:
        return recipe.data.train_weights[place]
    value: Any = recipe
    for part in parts:
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe of one trial: other values at these dotted keys, and no search.

    `adapter.kind` comes first: another kind than the recipe's own has its defaults, the same keeps its section.
    Raises RecipeError, as reading a recipe does, with everything that is wrong.
    """
    try:
        made = Recipe.model_validate(laid_in(recipe, values))
    except ValidationError as error:
        found = [Problem(dotted(one.key), one.says) for one in explain(error.errors(include_url=False))]
        raise RecipeError(recipe.name, found) from None
    against = [Problem(one.at if isinstance(one.at, str) else dotted(one.at), one.says) for one in clashes(made)]
    if against:
        raise RecipeError(recipe.name, against)
    return made


def laid_in(recipe: Recipe, values: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a recipe without search, and others at these keys; nothing is checked."""
    tree = recipe.model_dump(mode="python", exclude={"search"})
    kind = values.get("adapter.kind", recipe.adapter.kind)
    if kind != recipe.adapter.kind:
        tree["adapter"] = {"kind": kind}
    for key, value in values.items():
        parts = key.split(".")
        place = _file_of(parts, recipe.data)
        if place is not None:
            _lay_in_weight(tree["data"], recipe.data, place, value)
            continue
        if parts[:2] == ["adapter", "options"] and len(parts) > 2:
            parts[2:] = [".".join(parts[2:])]  # one key of PEFT's
        section = tree
        for part in parts[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}  # no such section: what is laid into it will be refused
            section = section[part]
        section[parts[-1]] = value
    return tree


def _file_of(parts: list[str], data: Data) -> int | None:
    """The place of the file whose weight a key names, as in data.train.0.weight; None for any other key."""
    is_weight = len(parts) == 4 and parts[:2] == ["data", "train"] and parts[3] == "weight"
    place = int(parts[2]) if is_weight and parts[2].isdecimal() else len(data.train)
    return place if place < len(data.train) else None


def _lay_in_weight(tree: dict[str, Any], data: Data, place: int, weight: Any) -> None:
    files = list(tree["train"])
    files[place] = {"path": data.train_files[place], "weight": weight}
    tree["train"] = files
