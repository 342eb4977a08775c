"""What to say about a key that is none: the words of other tools, the keys of other sections, the nearest key."""

from toolkit.recipe.adapter import KINDS, PeftKind
from toolkit.recipe.candidates import BASES
from toolkit.recipe.combine import COMBINES, Combination
from toolkit.recipe.model import (
    Base,
    Candidates,
    Clean,
    Columns,
    Data,
    Evaluate,
    Labels,
    NewBase,
    NewShape,
    Range,
    Recipe,
    Search,
    Serve,
    Train,
    WeightedFile,
)
from toolkit.recipe.nearest import did_you_mean, nearest
from toolkit.recipe.section import Section
from toolkit.recipe.tree import Key, dotted
from toolkit.recipe.words import ALSO, NO_KEY, OF_RANGES, PLACE_OF, normal

PLACES: tuple[tuple[str, type[Section]], ...] = (
    ("", Recipe), ("base", Base), ("base", NewBase), ("base", Candidates), ("base.new", NewShape), ("data", Data),
    ("data.format", Columns),
    ("data.format", Labels), ("data.clean", Clean), *(("adapter", section) for section in KINDS.values()),
    ("adapter", PeftKind), ("train", Train), ("search", Search), ("evaluate", Evaluate),
    ("serve", Serve), *(("combine", section) for section in COMBINES.values()),
)  # fmt: skip

# Every key of a recipe, with the places and sections that have it.
OWNERS: dict[str, list[tuple[str, type[Section]]]] = {}
for _place, _section in PLACES:
    for _name in _section.model_fields:
        OWNERS.setdefault(_name, []).append((_place, _section))


def unknown_key(key: Key, section: type[Section]) -> tuple[str, str | None]:
    """What to say about a key that `section` does not have, and the dotted key that was probably meant."""
    word, at = str(key[-1]), dotted(key[:-1])
    known = normal(word)
    if at == "base" and word in BASES and BASES & {*section.model_fields}:
        return _second_base(word, section), None
    if known in section.model_fields:
        return f"is spelled {known}", _join(at, known)
    if section is Range and known in OF_RANGES:
        return f"here it is called {OF_RANGES[known]}", _join(at, OF_RANGES[known])
    if section is WeightedFile:
        guess = nearest(word, WeightedFile.model_fields)
        says = f"not a key of {section.called}{did_you_mean(guess)}"
        remedy = "" if guess else ": {path: my.jsonl, weight: 2}. The shape of its rows goes to data.format"
        return says + remedy, _join(at, guess) if guess else None
    if section is PeftKind and known not in PLACE_OF:
        return f"not a key of {section.called}. PEFT's own keys stand under options: {{{word}: …}}", None
    if known in PLACE_OF:
        return _called(known, at, section)
    if known not in NO_KEY and known in OWNERS:
        return _belongs(known, at, section)
    if known in NO_KEY:
        return f"no key here: {NO_KEY[known]}. Remove it", None
    return _nearest(word, at, section)


def _second_base(word: str, section: type[Section]) -> str:
    if "candidates" in (word, *section.model_fields):
        return "a base is named (model), made (new) or chosen from several (candidates). Keep one of them"
    return "a base exists already (model) or is made (new), not both. Remove one"


def _called(word: str, at: str, section: type[Section]) -> tuple[str, str]:
    if issubclass(section, Combination) and any(place == at for place, _ in OWNERS.get(word, ())):
        return _belongs(word, at, section)  # method, say: a word for adapter.kind elsewhere, and a key of another kind
    target = PLACE_OF[word]
    place, _, name = target.rpartition(".")
    also = f". {ALSO[word]}" if word in ALSO else ""
    if place != at:
        return f"here it is {target}{also}", target
    if name in section.model_fields:
        return f"here it is called {name}{also}", target
    if section is PeftKind:
        return f"not a key of {section.called}. PEFT's own keys stand under options: {{{word}: …}}", target
    return f"here it is called {name}, and {section.called} has none. Remove it", target


def _belongs(name: str, at: str, section: type[Section]) -> tuple[str, str]:
    owners = OWNERS[name]
    here = [owner.called for place, owner in owners if place == at]
    if here:
        return f"is a key of {' and of '.join(here)}, not of {section.called}. Remove it", _join(at, name)
    elsewhere = {place for place, _ in owners if place != "combine"} or {"combine"}  # both have a rank, say
    places = sorted(_join(place, name) for place in elsewhere)
    return f"stands in the wrong section. Write {' or '.join(places)}", places[0]


def _nearest(word: str, at: str, section: type[Section]) -> tuple[str, str | None]:
    says = f"not a key of {section.called}"
    guess = nearest(word, [name for name in section.model_fields if name != "kind"] or ["kind"])
    if guess:
        return says + did_you_mean(guess), _join(at, guess)
    owned = nearest(word, OWNERS, 0.75)
    if owned:
        place = _join(OWNERS[owned][0][0], owned)
        return says + did_you_mean(place), place
    other = nearest(word, PLACE_OF, 0.85)
    if other:
        return says + did_you_mean(PLACE_OF[other]), PLACE_OF[other]
    return f"{says}. It has: {', '.join(section.model_fields)}", None


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
