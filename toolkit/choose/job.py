"""What an audition is told, and the recipe of one candidate."""

from dataclasses import dataclass
from pathlib import Path

from toolkit.judge import metrics_of
from toolkit.recipe.model import Base, Candidates, Lora, Recipe

TALKED = ("loss", "bits_per_byte", "chrf", "distinct_2", "repetition", "length", "ends")  # measured whatever is asked


@dataclass(frozen=True)
class Job:
    """What a process is told: the recipe with all candidates, which one, for how long, and where the result goes.

    data: SHA-256 of the recipe's files by name; key: of the result (result.py).
    """

    recipe: str
    model: str
    minutes: float
    key: str
    data: dict[str, str]
    out: str

    @property
    def failed(self) -> Path:
        """Where it is told why there is no result."""
        return Path(self.out).with_suffix(".failed.json")


def recipe_of(recipe: Recipe, model: str) -> Recipe:
    """The recipe of one candidate: its LoRA (or the default one) as a stack holds it, no search, every metric."""
    several = recipe.base
    assert isinstance(several, Candidates)  # looked at by whoever calls
    base = Base(model=model, quantize=several.quantize, trust_remote_code=several.trust_remote_code)
    plain = recipe.adapter if isinstance(recipe.adapter, Lora) else Lora()
    adapter = plain.model_copy(update={"dora": False, "init": "default"})
    wanted = dict.fromkeys([*metrics_of(recipe), *(TALKED if recipe.task != "classify" else ())])
    metrics = tuple(metric for metric in wanted if metric != "spoken")  # measured here, before and after
    told = {"base": base, "adapter": adapter, "search": None}
    return recipe.model_copy(update={**told, "evaluate": recipe.evaluate.model_copy(update={"metrics": metrics})})
