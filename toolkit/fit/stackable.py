"""Which recipes' adapters learn side by side in a stack, and what the others are called."""

from toolkit.recipe.experts import is_stacked
from toolkit.recipe.model import Lora, Prefix, Recipe


def holds(recipe: Recipe) -> bool:
    """Whether a stack can train this recipe's adapter beside others."""
    return is_stacked(recipe) and not _extras(recipe) and recipe.train.activation_checkpointing is not True


def name_of(recipe: Recipe) -> str:
    """A kind of adapter, with what sets it apart from those of its kind that a stack holds."""
    return " with ".join([recipe.adapter.kind, *_extras(recipe)])


def _extras(recipe: Recipe) -> list[str]:
    adapter = recipe.adapter
    if isinstance(adapter, Lora):
        return ["DoRA"] * adapter.dora + ["PiSSA"] * (adapter.init == "pissa")
    return ["projection"] * (isinstance(adapter, Prefix) and adapter.projection)
