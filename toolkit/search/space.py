"""What a trial tries: the recipe's dimensions as Optuna's parameters, the recipe's own values, the points of a grid."""

import itertools
import math
import random
from collections.abc import Mapping
from typing import Any

import optuna

from toolkit.recipe.model import Recipe
from toolkit.recipe.search import Dimension, Range, dimensions, value_of, with_values

KIND = "adapter.kind"


def suggest(trial: optuna.trial.Trial, recipe: Recipe) -> Recipe:
    """The recipe of one trial, with the values that the trial proposes; of kinds of adapter only the chosen one's.

    Raises RecipeError when the values, each legal by itself, do not go together.
    """
    values: dict[str, Any] = {}
    for dimension in dimensions(recipe):
        if dimension.when is None or dimension.when == values.get(KIND):
            values[dimension.key] = _suggest(trial, dimension)
    return with_values(recipe, values)


def _suggest(trial: optuna.trial.Trial, dimension: Dimension) -> Any:
    name, values = dimension.name, dimension.values
    if not isinstance(values, Range):
        return trial.suggest_categorical(name, values)
    if is_whole(values):
        low, high = int(values.low), int(values.high)
        return trial.suggest_int(name, low, high, step=int(values.step or 1), log=values.log)
    return trial.suggest_float(name, float(values.low), float(values.high), step=values.step, log=values.log)


def is_whole(values: Range) -> bool:
    """Whether a range holds whole numbers only."""
    return all(isinstance(number, int) for number in (values.low, values.high, values.step or 1))


def own_values(recipe: Recipe, resolved: Mapping[str, Any]) -> dict[str, Any] | None:
    """Optuna's parameters that make the recipe what it is without its search; None when it does not lie in its space.

    `resolved` says what `auto` is, by dotted key.
    """
    found: dict[str, Any] = {}
    for dimension in dimensions(recipe):
        if dimension.when is not None and dimension.when != recipe.adapter.kind:
            continue
        value = value_of(recipe, dimension.key)
        inside = _inside(resolved.get(dimension.key, value) if value == "auto" else value, dimension.values)
        if inside is None:
            return None
        found[dimension.name] = inside[0]
    return found


def _inside(value: Any, values: Range | tuple[Any, ...]) -> tuple[Any] | None:
    """The value as the dimension writes it, or None where it is not among its values."""
    if not isinstance(values, Range):
        same = [choice for choice in values if choice == value and isinstance(choice, bool) == isinstance(value, bool)]
        return (same[0],) if same else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not values.low <= value <= values.high:
        return None
    if is_whole(values):
        is_on_step = value == int(value) and (int(value) - int(values.low)) % int(values.step or 1) == 0
        return (int(value),) if is_on_step else None
    if values.step is None:
        return (float(value),)
    steps = (value - values.low) / values.step
    return (_point(values, round(steps)),) if math.isclose(steps, round(steps), abs_tol=1e-8) else None


def grid(recipe: Recipe) -> dict[str, list[Any]]:
    """Every value of every dimension, by parameter name; a range without a step has no such list.

    Raises ValueError for such a range, which no recipe with a grid holds.
    """
    return {dimension.name: _points(dimension) for dimension in dimensions(recipe)}


def _points(dimension: Dimension) -> list[Any]:
    values = dimension.values
    if not isinstance(values, Range):
        return list(values)
    if is_whole(values):
        return list(range(int(values.low), int(values.high) + 1, int(values.step or 1)))
    if values.step is None:
        raise ValueError(f"{dimension.name}: a range without a step has no grid")
    return [_point(values, i) for i in range(math.floor((values.high - values.low) / values.step + 1e-8) + 1)]


def _point(values: Range, i: int) -> float:
    """The i-th value of a range with steps, free of the rounding of its sum: 0.3, not 0.30000000000000004."""
    return min(float(f"{values.low + i * float(values.step or 0):.12g}"), float(values.high))


def walk(recipe: Recipe) -> list[dict[str, Any]]:
    """The points of the recipe's grid in an order that its seed shuffled: the first trials see all of the space."""
    by_name = grid(recipe)
    points = [dict(zip(by_name, values, strict=True)) for values in itertools.product(*by_name.values())]
    random.Random(recipe.train.seed).shuffle(points)
    return points
