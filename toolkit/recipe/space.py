"""The search section: how many trials, by which sampler and pruner, over which space.

A space maps a recipe's keys to a range or a list of choices; its key `adapter` may map kinds of adapter to spaces of
their own. What a space may say is checked in sense_space.py, once the recipe around it is known.
"""

import re
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, PlainValidator, Tag, WithJsonSchema

from toolkit.recipe.adapter import KINDS, PEFT_KINDS
from toolkit.recipe.section import Section, WordOr
from toolkit.recipe.words import OF_RANGES

FURTHEST = 10**15
STORAGES = ("sqlite", "postgresql", "postgresql+psycopg")


def _number_form(value: object) -> str:
    return "<whole>" if isinstance(value, int) and not isinstance(value, bool) else "<value>"


Number = Annotated[
    Annotated[int, Field(ge=-FURTHEST, le=FURTHEST), Tag("<whole>")]
    | Annotated[float, Field(ge=-FURTHEST, le=FURTHEST), Tag("<value>")],
    Discriminator(_number_form),
    WithJsonSchema({"type": "number"}),  # else a whole number would be both, which `oneOf` refuses
]


class Range(Section):
    """Numbers from low to high, both included. Whole numbers stay whole."""

    called: ClassVar[str] = "a range"
    low: Number = Field(description="the smallest value")
    high: Number = Field(description="the largest value")
    log: bool = Field(default=False, description="as likely between 1e-4 and 1e-3 as between 1e-3 and 1e-2")
    step: Number | None = Field(default=None, description="only low, low + step, … up to high")


def _is_choice(value: Any) -> bool | int | float | str | None:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError("a choice is a number, a word, true, false or null. Write one of them")


Choice = Annotated[
    bool | int | float | str | None,
    PlainValidator(_is_choice),
    WithJsonSchema({"type": ["boolean", "number", "string", "null"]}),
]
Choices = Annotated[tuple[Choice, ...], Field(strict=False, min_length=1)]


def _values_form(value: object) -> str | None:
    if isinstance(value, list | tuple):
        return "<choices>"
    return "<range>" if isinstance(value, dict | Range) else None


def _is_like_a_range(value: dict[Any, Any]) -> bool:
    return bool(set(value) & {*Range.model_fields, *OF_RANGES})


def _space_form(value: object) -> str | None:
    if not isinstance(value, dict) or _is_like_a_range(value):
        return _values_form(value)
    inside = value.values()
    has_maps = any(inner is None or (isinstance(inner, dict) and not _is_like_a_range(inner)) for inner in inside)
    return "<kinds>" if not value or has_maps or set(value) & {*KINDS, *PEFT_KINDS} else None


def _or_empty(value: object) -> object:
    return {} if value is None else value


ARange = Annotated[Range, Tag("<range>")]
SomeChoices = Annotated[Choices, Tag("<choices>")]
Values = Annotated[ARange | SomeChoices, Discriminator(_values_form)]
Kinds = dict[str, Annotated[dict[str, Values], BeforeValidator(_or_empty)]]
Space = dict[str, Annotated[ARange | SomeChoices | Annotated[Kinds, Tag("<kinds>")], Discriminator(_space_form)]]


def _is_storage(url: str) -> str:
    scheme, _, rest = url.partition("://")
    if scheme in ("postgres", "postgresql+psycopg2"):
        raise ValueError(f"{scheme}:// is not read here. Write postgresql://")
    if scheme not in STORAGES or not rest:
        shown = f"{scheme[:20]}://{'…' if rest else ''}" if "://" in url else "a word"
        raise ValueError(f"must be null, sqlite:///FILE or postgresql://USER@HOST/NAME, not {shown}")
    if scheme == "sqlite" and (not rest.startswith("/") or rest in ("/", "/:memory:")):
        raise ValueError(
            "a sqlite storage is a file that workers share. Write sqlite:///FILE, or sqlite:////FOLDER/FILE"
        )
    try:
        parts = urlsplit(url)
        lacks = scheme != "sqlite" and not (parts.path.strip("/") and (parts.port or True))
    except ValueError:
        raise ValueError("is no address. Write postgresql://USER:PASSWORD@HOST:PORT/NAME") from None
    if lacks:
        raise ValueError("names no database. Write postgresql://USER@HOST/NAME")
    return url


def without_password(url: str) -> str:
    """The address of a storage as it may be shown: with *** for its password."""
    try:
        parts = urlsplit(url)
        shown = parts._replace(query=re.sub(r"(^|&)(password=)[^&]*", r"\1\2***", parts.query))
        if parts.password is not None:
            user, _, host = parts.netloc.rpartition("@")
            shown = shown._replace(netloc=f"{user.partition(':')[0]}:***@{host}")
        return url if shown == parts else urlunsplit(shown)
    except ValueError:
        return f"{url.partition('://')[0]}://***"


class Search(Section):
    """Trials of the recipe with other values; the best trial's adapter is the result."""

    called: ClassVar[str] = "search"
    sampler: Literal["tpe", "random", "grid", "gp", "cmaes", "qmc"] = Field(
        default="tpe", description="what proposes the next values"
    )
    pruner: Literal["successive_halving", "hyperband", "median", "none"] = Field(
        default="successive_halving", description="what ends a bad trial early"
    )
    trials: int = Field(default=16, ge=1, le=100_000, description="how many are tried")
    minutes: Annotated[float, Field(gt=0, le=1_000_000)] | None = Field(
        default=None, description="no trial begins later than this; null: no limit"
    )
    patience: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        default=None, description="ended trials without a better one before it stops; null: never"
    )
    space: Annotated[Space, Field(min_length=1)] = Field(
        description="key: {low, high} or a list of choices; adapter: {KIND: {key: …}, …} for a space of each kind"
    )
    storage: Annotated[str, AfterValidator(_is_storage)] | None = Field(
        default=None, description="null: a journal in the run folder; or an sqlite or postgresql URL that workers share"
    )
    workers: WordOr[Annotated[int, Field(ge=1, le=1024)]] = Field(
        default="auto", description="processes on this machine"
    )
    side_by_side: WordOr[Annotated[int, Field(ge=1, le=1024)]] = Field(
        default="auto", description="trials that learn at once in one process"
    )
