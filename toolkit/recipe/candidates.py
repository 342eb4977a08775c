"""Several bases to choose from, as `base` may say for `choose`; a run trains on one."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from toolkit.recipe.section import Section, SomeStrings

BASES = frozenset({"model", "new", "candidates"})  # each names one of the alternatives that a base has


def _are_different(names: Sequence[str]) -> Sequence[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: named twice. Name each base once")
    return names


class Candidates(Section):
    """Bases that `choose` compares on the recipe's talk."""

    called: ClassVar[str] = "bases to choose from"
    candidates: Annotated[SomeStrings, AfterValidator(_are_different)] = Field(
        description="catalogue names, hub ids (owner/name) or folders"
    )
    minutes_each: float = Field(default=3.0, gt=0, le=10_000, description="how long each of them learns, by the clock")
    quantize: Literal["none", "nf4"] = Field(default="none", description="as in an existing base, for all of them")
    trust_remote_code: bool = Field(default=False, description="as in an existing base, for all of them")


def refusal(source: str) -> str:
    """What is said where a run is asked of a recipe that names several bases."""
    return (
        f"several bases to choose from, and a run trains on one. Compare them first: python -m toolkit choose {source}."
        " Or name one: base: {model: spoken-mini}"
    )
