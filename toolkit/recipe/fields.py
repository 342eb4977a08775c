"""What a JSON schema says of a field, in words for a table: its type, default and range.

For the references that are written from the code: recipes here, requests in serve/reference.py.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]

_NAMES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
_BOUNDS = {"minimum": "≥ ", "exclusiveMinimum": "> ", "maximum": "≤ ", "exclusiveMaximum": "< "}
_SIZES = {
    "minItems": ("at least", "items"),
    "maxItems": ("at most", "items"),
    "minProperties": ("at least", "entries"),
    "maxProperties": ("at most", "entries"),
    "maxLength": ("at most", "characters"),
}
_LARGEST = 10**15  # a bound beyond it only keeps a number in its machine word


def forms(schema: Schema) -> Iterator[Schema]:
    """The alternatives that a field has, nested unions opened; a field without any is its own only form."""
    inside = schema.get("oneOf") or schema.get("anyOf")
    if inside is None:
        yield schema
        return
    for one in inside:
        yield from forms(one)


def section_of(schema: Schema) -> str | None:
    """The name of the section that a form refers to."""
    return str(schema["$ref"]).rsplit("/", 1)[-1] if "$ref" in schema else None


def type_of(schema: Schema) -> str:
    """The type in words, as in `auto` or whole number; sections by their names in brackets."""
    words = dict.fromkeys(word for form in forms(schema) for word in _type(form))
    *most, last = [word for word in words if word != "null"] or ["anything"]
    listed = f"{', '.join(most)} or {last}" if most else last
    return f"{listed}; or `null`" if "null" in words else listed


def _type(form: Schema) -> Iterator[str]:
    name, kind = section_of(form), form.get("type")
    if name is not None:
        yield f"[{name}](#{name.lower()})"
    elif "const" in form:
        yield f"`{form['const']}`"
    elif "enum" in form:
        yield from (f"`{word}`" for word in form["enum"])
    elif kind == "array":
        yield f"list of {_inside(form.get('items', {}))}"
    elif kind == "object":
        inner = form.get("additionalProperties")
        yield f"map to {_inside(inner)}" if isinstance(inner, Mapping) else "map"
    elif isinstance(kind, list):
        yield "plain value"
    elif kind is not None:
        yield "null" if kind == "null" else _NAMES[kind]


def _inside(schema: Schema) -> str:
    """The type of what a list or a map holds, in brackets where it has alternatives."""
    words = type_of(schema)
    return f"({words})" if " or " in words else words


def range_of(schema: Schema) -> str:
    """The bounds in words, by alternative where there are several; empty where there are none."""
    of_all = ", ".join(_bounds({key: value for key, value in schema.items() if key not in ("oneOf", "anyOf")}))
    inside = [form for form in forms(schema) if form is not schema]
    said = [(type_of(form).split(" of ")[0], ", ".join(_bounds(form))) for form in inside if form.get("type") != "null"]
    of_each = [f"{kind}: {bounds}" if len(said) > 1 else bounds for kind, bounds in said if bounds]
    return "; ".join(filter(None, (of_all, *of_each)))


def _bounds(form: Schema) -> Iterator[str]:
    for key, sign in _BOUNDS.items():
        if key in form and abs(form[key]) < _LARGEST:
            yield f"{sign}{number(form[key])}"
    for key, (word, unit) in _SIZES.items():
        if key in form:
            yield f"{word} {form[key]} {unit if form[key] != 1 else unit.removesuffix('s').replace('entrie', 'entry')}"
    if form.get("minLength"):
        yield "not empty"
    if "pattern" in form:
        yield f"`{form['pattern']}`"
    if form.get("type") == "array" and isinstance(form.get("items"), Mapping):
        inner = ", ".join(_bounds(form["items"]))
        if inner:
            yield f"each {inner}"


def number(value: float) -> str:
    """A number as people write it."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def default_of(name: str, schema: Schema, required: list[str]) -> str:
    """The default as a recipe writes it; `(required)` where there has to be a value, a dash where none is said."""
    if name in required:
        return "(required)"
    if "default" not in schema:
        return "–"
    value = schema["default"]
    if isinstance(value, Mapping):
        return "its own defaults"
    return f"`{as_written(value)}`"


def as_written(value: Any) -> str:
    """A plain value as YAML's flow style has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_written, value))}]"
    if isinstance(value, str):
        return value if value.isidentifier() or value[:1].isalnum() else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return number(value) if not value.is_integer() else f"{value:.1f}"
    return json.dumps(value, ensure_ascii=False)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in markdown; what a cell holds may not break it."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)
