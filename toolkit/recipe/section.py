"""What every recipe section shares: its base class and the types of values that are not a plain number or text."""

import unicodedata
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

T = TypeVar("T")


class Section(BaseModel):
    """Every recipe section: unknown keys are refused, values cannot change after reading, nothing is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    called: ClassVar[str] = "a recipe"


def composed(value: object) -> object:
    """A text with every Hangul syllable composed; anything else as it is."""
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


def _text_or_value(value: object) -> str:
    return "<word>" if isinstance(value, str) else "<value>"


# Tags stand in angle brackets: so the keys of a place can be told from the branches that pydantic took (explain.py).
WordOr = Annotated[
    Annotated[Literal["auto"], Tag("<word>")] | Annotated[T, Tag("<value>")],
    Discriminator(_text_or_value),
]
AutoInt = WordOr[Annotated[int, Field(ge=1, le=1_000_000)]]
AutoRate = WordOr[Annotated[float, Field(gt=0, lt=100)]]
AutoBool = WordOr[bool]
Strings = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
SomeStrings = Annotated[Strings, Field(min_length=1)]
