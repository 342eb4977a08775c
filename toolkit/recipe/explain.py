"""What to say about a value that the sections refuse: one complaint for one mistake, with its remedy."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic_core import ErrorDetails

from toolkit.recipe.adapter import KINDS, PEFT_KINDS, PeftKind
from toolkit.recipe.combine import COMBINES
from toolkit.recipe.model import Base, Candidates, Columns, Labels, NewBase, Range, Recipe, WeightedFile
from toolkit.recipe.nearest import did_you_mean, nearest
from toolkit.recipe.section import Section
from toolkit.recipe.track import WithOptions
from toolkit.recipe.tree import Key, dotted
from toolkit.recipe.unknown import unknown_key
from toolkit.recipe.words import VALUES, normal

# The branches of unions, as they stand in pydantic's locations, and the section behind each.
BRANCHES: dict[str, type[Section] | None] = {
    **{f"<{kind}>": section for kind, section in (*KINDS.items(), *COMBINES.items())},
    "<peft>": PeftKind, "<model>": Base, "<new>": NewBase, "<candidates>": Candidates, "<columns>": Columns,
    "<labels>": Labels, "<options>": WithOptions,
    "<weighted>": WeightedFile, "<range>": Range, "<word>": None, "<value>": None, "<whole>": None, "<files>": None,
    "<choices>": None, "<kinds>": None, "<shares>": None,
}  # fmt: skip
HOW = {
    "name": "name: mine", "base": "base: {model: spoken-mini}", "base.model": "base: {model: spoken-mini}",
    "base.candidates": "base: {candidates: [spoken-mini, ./mine]}",
    "data": "data: {train: [my.jsonl]}", "data.train": "data: {train: [my.jsonl]}", "data.train.path": "path: my.jsonl",
    "search.space": "space: {train.learning_rate: {low: 1e-4, high: 1e-2, log: true}}",
    "combine.kind": f"kind: {', '.join(list(COMBINES)[:-1])} or {list(COMBINES)[-1]}",
    "experts": "experts: {polite: {data: {train: [polite.jsonl]}}, brief: {adapter: {kind: prefix}}}",
}  # fmt: skip
SHORT_FORMS = {
    "base": "base: {{model: {}}}", "adapter": "adapter: {{kind: {}}}", "data": "data: {{train: [{}]}}",
    "combine": "combine: {{kind: {}}}",
}  # fmt: skip
ACCEPTED = {
    "train.packing": "auto, true or false",
    "train.activation_checkpointing": "auto, true or false",
    "train.learning_rate": "auto or a number",
    "adapter.targets": "all-linear or a list of layer names, as in [q_proj, v_proj]",
    "adapter.layers": "all or a list of layer numbers, as in [0, 3]",
    "combine.weights": "equal, search, or a map as in {polite: 0.7, casual: 0.3}",
    "data.format": "auto, messages, sharegpt, alpaca, prompt_completion, text, {kind: columns, …} or {kind: labels, …}",
}
HOW_FULL = ("search.space", "experts")  # maps that may not be empty
BOUNDS = {
    "greater_than": ("more than", "gt"), "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"), "less_than_equal": ("at most", "le"),
}  # fmt: skip


@dataclass(frozen=True)
class Complaint:
    """One mistake: the key, what to say, and the key that the user seems to have meant."""

    key: Key
    says: str
    meant: str | None = None
    is_unknown: bool = False
    is_missing: bool = False
    is_silent: bool = False


def explain(errors: Sequence[ErrorDetails]) -> list[Complaint]:
    """One complaint for each mistake behind pydantic's errors; silent where a key is missing that has a wrong name."""
    complaints = [_explain_one(error) for error in errors if not _follows_from_another(error)]
    meant = [f"{complaint.meant}." for complaint in complaints if complaint.meant]
    return [
        replace(one, is_silent=one.is_missing and any(name.startswith(f"{dotted(one.key)}.") for name in meant))
        for one in complaints
    ]


def _follows_from_another(error: ErrorDetails) -> bool:
    """A list counts as too short when its items are wrong; the items have been complained about."""
    return error["type"] == "too_short" and bool(error["input"])


def _explain_one(error: ErrorDetails) -> Complaint:
    kind, value, where = error["type"], error["input"], error["loc"]
    key: Key = tuple(part for part in where if part not in BRANCHES and part != "[key]")
    name = dotted(tuple(part for part in key if not isinstance(part, int)))
    if kind == "extra_forbidden":
        key = (*(part for part in where[:-1] if part not in BRANCHES), where[-1])
        says, meant = unknown_key(key, _section_around(where))
        return Complaint(key, says, meant, is_unknown=True)
    if kind == "missing":
        return Complaint(key, f"is missing. Write {HOW.get(name, f'{key[-1]}: …')}", is_missing=True)
    if kind == "value_error":
        return Complaint((*key, "kind") if name == "adapter" else key, f"{error['ctx']['error']}")
    if kind == "union_tag_invalid" and isinstance(value, dict):
        return Complaint((*key, "kind"), _wrong_kind(name, value.get("kind")))
    if kind == "literal_error":
        return Complaint(key, _wrong_word(name, value, re.findall(r"'([^']*)'", error["ctx"]["expected"])))
    if kind == "dict_type" and name.startswith("search.space."):
        return Complaint(key, f"must be a map of keys, as in {{train.learning_rate: [0.01]}}, not {shown(value)}")
    if name == "combine" and kind == "union_tag_not_found" and isinstance(value, dict):
        return Complaint((*key, "kind"), f"is missing. Write {HOW['combine.kind']}")
    if kind in ("union_tag_not_found", "model_type", "dict_type", "model_attributes_type"):
        return Complaint(key, _wrong_section(name, value))
    return Complaint(key, _wrong_value(name, error))


def _section_around(where: tuple[int | str, ...]) -> type[Section]:
    section: type[Section] = Recipe
    for part in where[:-1]:
        inner = BRANCHES.get(part) if isinstance(part, str) else None
        if inner is None and isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            forms = (annotation, *get_args(annotation))  # of `Search | None` both
            inner = next((one for one in forms if isinstance(one, type) and issubclass(one, Section)), None)
        section = inner or section
    return section


def _wrong_kind(name: str, kind: object) -> str:
    if name == "data.format":
        return f"must be columns or labels, not {shown(kind)}"
    known = VALUES[f"{name}.kind"].get(normal(str(kind)))
    if known:
        return f"here it is called {known}"
    if name == "combine":
        accepted = HOW["combine.kind"].removeprefix("kind: ")
        return f"must be {accepted}, not {shown(kind)}{did_you_mean(nearest(str(kind), COMBINES))}"
    guess = nearest(str(kind), [*KINDS, *PEFT_KINDS])
    if guess:
        return f"{shown(kind)} is not a kind of adapter{did_you_mean(guess)}"
    return f"{shown(kind)} is not a kind of adapter: {', '.join(KINDS)}, or a kind of PEFT by its name, as in ia3"


def _wrong_word(name: str, value: object, words: list[str]) -> str:
    listed = " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    accepted = ACCEPTED.get(name, "auto or a whole number" if words == ["auto"] else listed)
    if not isinstance(value, str):
        return f"must be {accepted}, not {shown(value)}"
    if name == "adapter.init" and value.startswith("pissa"):
        return f"{value} does not come back as it was saved. Write pissa, which is exact"
    known = VALUES.get(name, {}).get(normal(value))
    if known in words:
        return f"{shown(value)}: here it is called {known}"
    if "true or false" in accepted:
        return f"must be {accepted}, not {shown(value)}{_truth(value)}"
    if "number" in accepted and _is_number(value):
        return f"must be {accepted}, not {shown(value)}. Remove the quotes"
    guess = nearest(value, words)
    return f"must be {accepted}, not {shown(value)}{did_you_mean(guess)}"


def _wrong_section(name: str, value: object) -> str:
    if name == "data.format":
        return f"must be {ACCEPTED[name]}"
    if name.startswith("search.space."):
        one = f". Write [{value}]" if isinstance(value, str | int | float) else ""
        one = f". A key is written whole, as in {name[13:]}.{next(iter(value))}" if isinstance(value, dict) else one
        return f"must be a range {{low: …, high: …}} or a list of choices, not {shown(value)}{one}"
    if isinstance(value, str) and name.count(".") == 1 and name.startswith("experts."):
        return f"must be a section. Write {{run: {value}}} for a run that exists"
    if isinstance(value, str) and name in SHORT_FORMS:
        told, comma, besides = VALUES.get(f"{name}.kind", {}).get(normal(value), value).partition(", with ")
        extra = f", with {besides}" if comma else ""
        return f"must be a section. Write {SHORT_FORMS[name].format(told)}{extra}"
    return f"must be a section with keys below it, not {shown(value)}"


def _wrong_value(name: str, error: ErrorDetails) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind in BOUNDS:
        words, bound = BOUNDS[kind]
        share = ". It is a share: 0.1 is a tenth" if context[bound] in (0.5, 1) and kind.startswith("less") else ""
        return f"must be {words} {context[bound]:g}, not {shown(value)}{share}"
    if kind in ("int_type", "float_type"):
        number = "a whole number" if kind == "int_type" else "a number"
        remedy = f". Write {value:g}" if isinstance(value, float) and value.is_integer() else ""
        remedy = ". Remove the quotes" if isinstance(value, str) and _is_number(value) else remedy
        return f"must be {number}, not {shown(value)}{remedy}"
    if kind == "bool_type":
        return f"must be true or false, not {shown(value)}{_truth(value)}"
    if kind == "string_type" and name.startswith("data.") and isinstance(value, dict):
        return "must be a file's name, not a section. The shape of its rows goes to data.format"
    if kind == "string_type":
        simple = isinstance(value, int | float) and not isinstance(value, bool)
        return f"must be text, not {shown(value)}" + (f'. Write "{value}"' if simple else "")
    if kind == "string_too_short":
        return "is empty. Write something, or remove it"
    if kind == "too_short":
        return f"is empty. Write {HOW[name]}" if name in HOW_FULL else "is an empty list. Name at least one"
    if kind in ("tuple_type", "list_type"):
        as_list = f", as in [{value}]" if isinstance(value, str | int | float) else ""
        return f"must be a list{as_list}, not {shown(value)}" + (". Write [] for none" if value is None else "")
    if kind == "finite_number":
        return "must be a finite number"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, not {shown(value)}"


def _truth(value: object) -> str:
    truth = {
        "yes": "true",
        "y": "true",
        "on": "true",
        "no": "false",
        "n": "false",
        "off": "false",
        "1": "true",
        "0": "false",
    }
    word = truth.get(str(value).lower(), str(value).lower() if isinstance(value, str) else "")
    return f". Write {word}" if word in ("true", "false") else ""


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text.strip()) is not None


def shown(value: Any) -> str:
    """A value as a message shows it: as in YAML, and short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}…'"
    if isinstance(value, dict):
        return "a section"
    return "a list" if isinstance(value, list | tuple) else repr(value)
