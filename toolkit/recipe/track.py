"""What a recipe may say of trackers: their names, or one with its options."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from toolkit.recipe.section import Section

Name = Literal["tensorboard", "wandb", "trackio"]


class WandbOptions(Section):
    """How wandb is used."""

    called: ClassVar[str] = "wandb's options"
    project: str = Field(default="maltu", min_length=1, max_length=128, description="the project that runs stand in")
    group: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None, description="what runs stand together under; null: a search, or the same recipe"
    )
    artifact: bool = Field(default=False, description="send what was trained as well")


class WithOptions(Section):
    """A tracker with its options."""

    called: ClassVar[str] = "a tracker with options"
    wandb: WandbOptions = Field(description="wandb, and how")


def tracker_name(tracker: "str | WithOptions") -> str:
    """The tracker's name."""
    return tracker if isinstance(tracker, str) else "wandb"


def _are_different(trackers: Sequence["str | WithOptions"]) -> Sequence["str | WithOptions"]:
    names = [tracker_name(tracker) for tracker in trackers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: named twice. Name each tracker once")
    return trackers


def _form(value: object) -> str:
    return "<options>" if isinstance(value, dict | WithOptions) else "<word>"


Tracker = Annotated[
    Annotated[Name, Tag("<word>")] | Annotated[WithOptions, Tag("<options>")],
    Discriminator(_form),
]
Trackers = Annotated[tuple[Tracker, ...], Field(strict=False), AfterValidator(_are_different)]
