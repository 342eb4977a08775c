"""What a study was begun with, so that nobody goes on with another recipe in it."""

import json
from collections.abc import Mapping
from typing import Any

from toolkit.errors import RunError
from toolkit.fit.inputs import changes
from toolkit.recipe.model import Recipe

MAY_CHANGE = ("trials", "minutes", "patience", "workers", "side_by_side", "storage")


def kept(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe and its inputs that stays what it is, as JSON. Where the study lies is not in it: workers
    may reach it under several names, and its address may hold a password.
    """
    may_change = {f"search.{key}" for key in MAY_CHANGE}
    recipe = {key: value for key, value in identity["recipe"].items() if key not in may_change}
    plain: dict[str, Any] = json.loads(json.dumps({**identity, "recipe": recipe}))
    return plain


def refuse_changed(recipe: Recipe, place: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise RunError with everything that changed since the study was begun, and the two ways on."""
    found = changes(before, now)
    if not found:
        return
    listed = "\n".join(f"  {line}" for line in found)
    is_own_file = recipe.search is None or recipe.search.storage is None
    other = "start anew with --fresh (the old folder is kept)" if is_own_file else "another search.storage"
    raise RunError(
        f"{place}: the study '{recipe.name}' was begun with something else:\n{listed}\n"
        f"Search beside it with name={recipe.name}-2, or {other}."
    )


def refuse_foreign(recipe: Recipe, place: str, n_trials: int) -> None:
    """Raise RunError for a study of the same name that something else began."""
    if n_trials:
        raise RunError(
            f"{place}: holds a study '{recipe.name}' with {n_trials} trials that was not begun by a recipe."
            f" Search beside it with name={recipe.name}-2, or another search.storage."
        )
