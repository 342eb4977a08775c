"""What is known of a candidate before it is tried, and which candidates do not come into question."""

import contextlib
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from toolkit.bases.catalog import find
from toolkit.bases.fetch import find_folder, is_folder_name
from toolkit.bases.files import weight_files
from toolkit.errors import BaseError
from toolkit.fit.plan import Place
from toolkit.recipe.model import Base

COMMERCIAL = "commercial"
BYTES = {"none": {"cpu": 4.0, "other": 2.0}, "nf4": {"cpu": 0.6, "other": 0.6}}  # of a weight
ROOM = 1.15  # what learning needs beside the weights, at the least


@dataclass(frozen=True)
class About:
    """A candidate as the user named it, and what was read of it; None is «not known». `hub_id`: its name on the hub."""

    model: str
    hub_id: str | None
    parameters: int | None
    licence: str | None
    commercial: bool | None
    languages: tuple[str, ...] | None
    more_languages: int
    note: str

    @property
    def speaks(self) -> str:
        """Its languages in a few words."""
        more = f" +{self.more_languages}" if self.more_languages else ""
        return " ".join(self.languages) + more if self.languages else "not known"


@dataclass(frozen=True)
class Filters:
    """What the user asked of a base: one of some licences, all of some languages, at most so many weights."""

    licences: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    max_parameters: int | None = None


def about(base: Base) -> About:
    """What the catalogue says of a base; of one in a folder here the weights are counted. Fetches nothing."""
    known = find(base.model)
    if known is not None:
        return About(
            base.model,
            known.hub_id,
            known.parameters,
            known.licence,
            known.commercial,
            known.languages,
            known.more_languages,
            known.note,
        )
    is_folder = is_folder_name(base.model)
    hub_id = None if is_folder else base.model
    return About(base.model, hub_id, _count(base) if is_folder else None, None, None, None, 0, "")


def _count(base: Base) -> int | None:
    """The numbers in the weight files of a folder; None where they cannot be read (loading will say why)."""
    total = 0
    with contextlib.suppress(BaseError, OSError, SafetensorError):
        for file in weight_files(find_folder(base, weights=True), base.model):
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():
                    size = 1
                    for length in opened.get_slice(name).get_shape():
                        size *= length
                    total += size
    return total or None


def objections(one: About, filters: Filters) -> list[str]:
    """Why the user's filters leave it out; empty: they do not. What is not known does not pass a filter."""
    found = []
    if filters.licences and not any(_is_under(one, wanted) for wanted in filters.licences):
        wanted = " or ".join(filters.licences)
        found.append(f"licence {one.licence or 'not known'}, asked: {wanted}")
    lacking = [lang for lang in filters.languages if lang not in (one.languages or ())]
    if lacking:
        found.append(f"languages {one.speaks}, asked: {' and '.join(filters.languages)}")
    if filters.max_parameters is not None and (one.parameters is None or one.parameters > filters.max_parameters):
        size = "not known" if one.parameters is None else f"{one.parameters:,}"
        found.append(f"weights {size}, asked: at most {filters.max_parameters:,}")
    return found


def _is_under(one: About, wanted: str) -> bool:
    if wanted.casefold() == COMMERCIAL:
        return one.commercial is True
    return one.licence is not None and one.licence.casefold() == wanted.casefold()


def too_large(one: About, base: Base, place: Place) -> str | None:
    """Why its weights do not fit in the memory that is free here, or None: they do, or their number is not known."""
    if one.parameters is None:
        return None
    each = BYTES[base.quantize]["cpu" if place.device == "cpu" else "other"]
    needed = one.parameters * each * ROOM
    if needed <= place.free_bytes:
        return None
    smaller = "" if base.quantize == "nf4" or place.device == "cpu" else ", base.quantize=nf4"
    return (
        f"needs about {needed / 2**30:.1f} GB of memory and {place.free_bytes / 2**30:.1f} GB are free on"
        f" {place.device}. Free some{smaller}, or take a smaller base"
    )
