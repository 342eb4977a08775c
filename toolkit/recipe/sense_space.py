"""What a search cannot mean: a space that its recipe or its sampler does not go with. Told before the first trial."""

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import combinations, islice, product
from math import prod
from typing import Any

from pydantic import ValidationError

from toolkit.recipe.adapter import PeftKind
from toolkit.recipe.explain import explain, shown
from toolkit.recipe.model import NewBase, Recipe
from toolkit.recipe.search import Dimension, adapter_section, laid_in, types_of, written
from toolkit.recipe.section import Section
from toolkit.recipe.sense import Clash, clashes
from toolkit.recipe.space import Range, Space
from toolkit.recipe.tree import Key, dotted
from toolkit.recipe.unknown import unknown_key

MOST_POINTS = 10_000
MOST_PAIRS = 500
JUDGED = "it changes what trials are judged by"
SPEED = "it changes speed and memory, not what is learned"
UNLEARNED = "it changes nothing that is learned"
ONE_FIRST = "one adapter is searched first, then combined"
NOT_SEARCHED: Mapping[str, str] = {
    "name": "it names the run", "task": JUDGED, "evaluate": JUDGED, "data": JUDGED, "track": UNLEARNED,
    "serve": UNLEARNED, "base": "all trials share one base", "search": "a search does not search itself",
    "experts": ONE_FIRST, "combine": ONE_FIRST,
    "train.micro_batch": SPEED, "train.precision": SPEED, "train.packing": SPEED,
    "train.activation_checkpointing": SPEED, "train.evaluate_every": "it changes when trials are compared",
    "train.keep": "the checkpoints of a trial are not kept",
}  # fmt: skip


def misfits(recipe: Recipe) -> Iterator[Clash]:
    """Everything that is wrong with the search of a recipe whose sections are right one by one."""
    if recipe.search is None:
        return
    if recipe.data.valid == 0:
        says = "0 holds nothing out, so a search has nothing to compare trials by. Write valid: 0.1"
        yield Clash("data.valid", says, ("search",))
    if isinstance(recipe.base, NewBase):
        says = "trials are adapters on one base, and here each would make its own. Name a base, or remove search"
        yield Clash("search", says, ("base",))
    yield from _forms(recipe.search.space)
    sound: list[Dimension] = []
    kinds: list[str] = []
    for one in written(recipe):
        if one.when is not None and one.when not in kinds:
            continue  # the kind itself has been complained about
        found = list(_dimension(recipe, one, kinds))
        yield from found
        if one.name == "adapter.kind":
            kinds += [str(kind) for kind in one.values if not any(clash.at[-1] == kind for clash in found)]
        elif not found:
            sound.append(one)
    yield from _written_twice(sound, kinds)
    yield from _pairs(recipe, sound, kinds)
    yield from _sampler(recipe, sound, kinds)


def _dimension(recipe: Recipe, one: Dimension, kinds: Sequence[str]) -> Iterator[Clash]:
    section, _, _ = one.key.partition(".")
    needs = (section,) if section == "adapter" else ("data.train",) if section == "data" else ()
    says = _wrong_key(recipe, one)
    if says:
        yield Clash(one.place, says, needs)
        return
    takes = types_of(recipe, one)
    if isinstance(one.values, Range):
        if not takes & {int, float}:
            listed = "true and false" if takes == {bool} else "words"
            yield Clash(one.place, f"{one.key} takes {listed}, not a range. Write a list of choices", needs)
            return
        yield from (Clash(one.place, says, needs) for says in _wrong_range(one.values, float not in takes))
    else:
        yield from _repeated(one, one.values)
    illegal = {}
    for place, value in _ends(one):
        if place == "low" and _is_log_of_nothing(one.values):
            continue  # complained about
        wrong = _illegal(recipe, one, value, kinds)
        if wrong is not None:
            illegal[place] = Clash((*one.place, place), wrong.says, (*needs, *wrong.needs))
    yield from illegal.values()
    if one.key == "train.batch_size":
        yield from (clash for clash in _uneven(recipe, one) if clash.at[-1] not in illegal)


def _forms(space: Space) -> Iterator[Clash]:
    """Kinds of adapter where none go, and none where they go."""
    for key, values in space.items():
        names = [str(name) for name in values] if isinstance(values, dict | tuple) else ["lora", "prefix"]
        listed = "{" + ", ".join(f"{name}: {{}}" for name in names or ["lora", "prefix"]) + "}"
        says = None
        if key == "adapter.kind":
            says = f"a kind brings its own keys. Write adapter: {listed}"
        elif key == "adapter" and not (values and isinstance(values, dict)):
            says = f"must be a map of kinds, each with its own keys. Write {listed}"
        elif key != "adapter" and isinstance(values, dict):
            whole = f". A key is written whole, as in {key}.{names[0]}" if values else ""
            says = f"must be a range {{low: …, high: …}} or a list of choices{whole}"
        if says:
            yield Clash(("search", "space", key), says)


def _wrong_key(recipe: Recipe, one: Dimension) -> str | None:
    """Why the key is none, or none that may be searched."""
    if one.when is not None and one.name.startswith(f"{one.when}/adapter."):
        return f"below a kind its own keys stand without adapter. Write {one.key.removeprefix('adapter.')}"
    parts = tuple(one.key.split("."))
    if one.key == "adapter.kind" or (parts[:2] == ("adapter", "options") and len(parts) > 2 and _is_peft(recipe, one)):
        return None
    if parts[:2] == ("data", "train"):
        return _wrong_weight(parts, len(recipe.data.train))
    value: Any = recipe
    for depth, part in enumerate(parts if parts[0] not in ("experts", "combine") else parts[:1]):
        if depth and not isinstance(value, Section):
            return f"{dotted(parts[:depth])} has no keys below it"
        section = adapter_section(recipe, one.when) if parts[:depth] == ("adapter",) else type(value)
        if part not in section.model_fields:
            return unknown_key(parts[: depth + 1], section)[0]
        value = getattr(value, part, None)
    why = next((why for key, why in NOT_SEARCHED.items() if f"{one.key}.".startswith(f"{key}.")), None)
    if why is not None:
        return f"cannot be searched: {why}. Remove it here, and set it in the recipe itself"
    if one.key == "adapter.options":
        return "is a section. Write PEFT's keys whole, as in adapter.options.KEY"
    if isinstance(value, Section):
        keys = [name for name in type(value).model_fields if f"{one.key}.{name}" not in NOT_SEARCHED and name != "kind"]
        return f"is a section. Write its keys whole, as in {one.key}.{keys[0] if keys else 'rank'}"
    return None


def _is_peft(recipe: Recipe, one: Dimension) -> bool:
    return adapter_section(recipe, one.when) is PeftKind


def _wrong_weight(parts: Key, n_files: int) -> str | None:
    number = str(parts[2]) if len(parts) > 2 else ""
    if len(parts) != 4 or not (number.isascii() and number.isdecimal()) or str(int(number)) != number:
        return "of data only the weights of files are searched. Write data.train.0.weight for the first file"
    if parts[3] != "weight":
        return f"of a file only its weight is searched. Write data.train.{number}.weight"
    if int(number) >= n_files:
        files = f"{n_files} files, 0 to {n_files - 1}" if n_files > 1 else "one file, 0"
        return f"there is no file {number}: data.train names {files}"
    return None


def _wrong_range(values: Range, is_whole: bool) -> Iterator[str]:
    low, high, step = Decimal(str(values.low)), Decimal(str(values.high)), values.step
    if low == high:
        yield f"low and high are both {values.low}. Widen the range, or write {values.low} in the recipe itself"
    elif low > high:
        yield f"low ({values.low}) must be below high ({values.high}). Swap them"
    if _is_log_of_nothing(values):
        yield f"log wants low above 0, not {values.low}. Write a small number, or log: false"
    if step is None:
        return
    if values.log:
        yield "log and step do not go together. Remove one"
    elif step <= 0:
        yield f"step must be more than 0, not {step}"
    elif is_whole and not isinstance(step, int):
        yield f"step must be a whole number, not {step}"
    elif low < high and (high - low) % Decimal(str(step)):
        last = low + (high - low) // Decimal(str(step)) * Decimal(str(step))
        written = f"{last.normalize():f}"
        near = f"Write high: {written}" if last > low else "Write a smaller step"
        yield f"steps of {step} from {values.low} do not meet {values.high}. {near}"


def _is_log_of_nothing(values: object) -> bool:
    return isinstance(values, Range) and values.log and values.low <= 0


def _repeated(one: Dimension, choices: Sequence[Any]) -> Iterator[Clash]:
    seen: set[tuple[bool, Any]] = set()
    for index, choice in enumerate(choices):
        same = (isinstance(choice, bool), choice)
        if same in seen:
            yield Clash((*one.place, index), f"{shown(choice)} is listed twice. Name it once")
        seen.add(same)


def _ends(one: Dimension) -> list[tuple[int | str, Any]]:
    """The values that are tried here: every choice, both ends of a range."""
    if isinstance(one.values, Range):
        return [("low", one.values.low), ("high", one.values.high)]
    return [(kind, kind) for kind in map(str, one.values)] if one.name == "adapter.kind" else [*enumerate(one.values)]


def _illegal(recipe: Recipe, one: Dimension, value: Any, kinds: Sequence[str]) -> Clash | None:
    """Why the recipe cannot have this value, under the dimension's kind of adapter or under any of the space."""
    for kind in _contexts(one, kinds):
        values = {one.key: value} if kind is None else {"adapter.kind": kind, one.key: value}
        wrong = _against(recipe, values, one.key)
        if wrong is not None:
            says = wrong.says
            is_own = wrong.at == one.key or str(wrong.at).startswith(f"{one.key}.")
            if not is_own:
                says = f"with {shown(value)}{f' for {kind}' if kind else ''}, {wrong.at}: {says}"
            return Clash(wrong.at, says, wrong.needs)
    return None


def _contexts(one: Dimension, kinds: Sequence[str]) -> list[str | None]:
    """The kinds of adapter that the dimension is tried with; None is the recipe's own."""
    if one.name == "adapter.kind":
        return [None]
    return [one.when] if one.when is not None else [*kinds] or [None]


def _against(recipe: Recipe, values: Mapping[str, Any], key: str) -> Clash | None:
    """The first thing that is wrong with the recipe once it has these values, where it was not wrong before."""
    try:
        made = Recipe.model_validate(laid_in(recipe, values))
    except ValidationError as error:
        found = explain(error.errors(include_url=False))
        first = next((one for one in found if dotted(one.key) == key), found[0])
        return Clash(dotted(first.key), first.says)
    before = {one.at for one in clashes(recipe)}
    against = next((one for one in clashes(made) if one.at not in before), None)
    if against is None:
        return None
    needs = (against.at, *against.needs)
    return Clash(against.at, against.says, tuple(str(name) for name in needs if name not in values))


def _uneven(recipe: Recipe, one: Dimension) -> Iterator[Clash]:
    """Batches that a micro batch which is set does not divide: the plan of such a trial would be refused."""
    micro, values = recipe.train.micro_batch, one.values
    if micro == "auto":
        return
    says = f"train.micro_batch ({micro}) must divide every batch. Write multiples of {micro}, or micro_batch: auto"
    if not isinstance(values, Range):
        for index, batch in enumerate(values):
            if isinstance(batch, int) and batch % micro:
                yield Clash((*one.place, index), says, ("train.micro_batch",))
    elif values.log or values.low % micro or (values.step or 1) % micro:
        yield Clash(one.place, says, ("train.micro_batch",))


def _written_twice(sound: Sequence[Dimension], kinds: Sequence[str]) -> Iterator[Clash]:
    for_all = {one.key for one in sound if one.when is None}
    for one in sound:
        if one.when is not None and one.key in for_all and not one.key.startswith("adapter."):
            says = f"{one.key} is searched for every kind already. Keep it there, or below each kind"
            yield Clash(one.place, says)
        elif one.when is None and kinds and one.key.startswith("adapter."):
            name = one.key.removeprefix("adapter.")
            says = f"belongs to one of the kinds that are searched. Write adapter: {{{kinds[0]}: {{{name}: …}}}}"
            yield Clash(one.place, says)


def _pairs(recipe: Recipe, sound: Sequence[Dimension], kinds: Sequence[str]) -> Iterator[Clash]:
    """Two values that are right one by one and contradict each other; of large spaces only the first MOST_PAIRS."""
    contexts: list[str | None] = [*kinds]
    for kind in contexts or [None]:
        here = [one for one in sound if one.when in (None, kind)]
        tried = (
            (one, first, other, second)
            for one, other in combinations(here, 2)
            for (_, first), (place, second) in product(_ends(one), _ends(other))
        )
        told: set[tuple[str, str]] = set()
        for one, first, other, second in islice(tried, MOST_PAIRS):
            values = {one.key: first, other.key: second} | ({"adapter.kind": kind} if kind else {})
            if one.key == other.key or (one.name, other.name) in told:
                continue
            wrong = _against(recipe, values, other.key)
            alone = wrong and (_illegal(recipe, one, first, kinds) or _illegal(recipe, other, second, kinds))
            if wrong and not alone:
                told.add((one.name, other.name))
                at = "" if wrong.at == other.key else f"{wrong.at} "
                says = f"{shown(second)} with {one.key}: {shown(first)}: {at}{wrong.says}"
                yield Clash(other.place, says, wrong.needs)


def _sampler(recipe: Recipe, sound: Sequence[Dimension], kinds: Sequence[str]) -> Iterator[Clash]:
    sampler = recipe.search.sampler if recipe.search else "tpe"
    of_kind = next((one for one in sound if one.when is not None), None)
    listed = next((one.name for one in sound if not isinstance(one.values, Range)), "adapter" if kinds else None)
    if sampler in ("grid", "gp", "cmaes", "qmc") and of_kind is not None:
        says = f"{sampler} needs the same keys in every trial, and {of_kind.key} is searched for {of_kind.when} only"
        yield Clash("search.sampler", f"{says}. Write sampler: tpe, or random", ("search.space",))
        return
    if sampler == "cmaes" and listed is not None:
        says = f"cmaes moves in numbers only, and {listed} is a choice. Write ranges, or sampler: tpe"
        yield Clash("search.sampler", says, ("search.space",))
    if sampler != "grid":
        return
    counts = [n_points(one.values) for one in sound]
    for one, count in zip(sound, counts, strict=True):
        if count is None:
            remedy = "List the values" if isinstance(one.values, Range) and one.values.log else "Write step: …"
            yield Clash(one.place, f"a grid has points, and this range has none. {remedy}, or sampler: tpe")
    points = prod(count for count in counts if count is not None) * max(1, len(kinds))
    if points > MOST_POINTS:
        says = f"a grid of {points:,} points; {MOST_POINTS:,} are the most. Name fewer values, or write sampler: tpe"
        yield Clash("search.space", says)


def n_points(values: Range | tuple[Any, ...]) -> int | None:
    """How many points of a grid these values are; None for a range without a step."""
    if not isinstance(values, Range):
        return len(values)
    if values.step is None:
        return None
    return int((Decimal(str(values.high)) - Decimal(str(values.low))) // Decimal(str(values.step))) + 1
