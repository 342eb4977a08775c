"""docs/reference/recipe.md, written from the sections of a recipe: every key, its type, default, range and meaning.

python -m toolkit.recipe.reference > docs/reference/recipe.md
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from toolkit.recipe.adapter import REFUSED_KINDS
from toolkit.recipe.combine import MERGES
from toolkit.recipe.fields import Schema, default_of, forms, range_of, section_of, table, type_of
from toolkit.recipe.show import schema

_HEAD = """# A recipe, key by key

Written by `python -m toolkit.recipe.reference > docs/reference/recipe.md`; a test keeps it true. A key that is left out
has the default shown here. Unknown keys are refused, the nearest one named; `python -m toolkit check RECIPE` prints
all values as they will be, `auto` worked out. On the command line a key is written with dots: `train.epochs=5`. Editors
that know YAML schemas read `recipes/recipe.schema.json`, which says the same. What the keys are for:
[the tour](../tour.md), [search](../search.md), [experts](../howto/experts.md), [ways of combining](../methods.md),
[metrics](metrics.md)."""
_EACH = "(required, or in every expert)"
_SHARED = {("A recipe of Maltu", "data"): _EACH, ("Data", "train"): _EACH}  # what experts may bring along
_COLUMNS = ("key", "type", "default", "range", "meaning")


def document() -> str:
    """The page."""
    found: dict[str, Any] = json.loads(schema())
    parts = [_HEAD, f"## Recipe\n\n{found['description']}", _keys(found)]
    for name in _reached(found, found["$defs"]):
        section = found["$defs"][name]
        parts.append(f"### {name}\n\n{_where(name, found)}{section['description']}")
        parts.append(_keys(section))
        parts += _besides(name)
    return "\n\n".join(parts) + "\n"


def _keys(section: Schema) -> str:
    required = list(section.get("required", ()))
    rows = [
        (
            f"`{key}`",
            type_of(field),
            _SHARED.get((section["title"], key)) or default_of(key, field, required),
            range_of(field),
            field.get("description", ""),
        )
        for key, field in section["properties"].items()
    ]
    return table(_COLUMNS, rows)


def _besides(name: str) -> list[str]:
    """What a section's schema cannot say."""
    if name == "PeftKind":
        return ["Not taken, and why:\n\n" + "\n".join(f"- `{kind}`: {why}" for kind, why in REFUSED_KINDS.items())]
    if name == "Merge":
        rows = [(f"`{kind}`", ", ".join(f"`{method}`" for method in methods)) for kind, methods in MERGES.items()]
        return [table(("adapters of kind", "methods that add them up"), rows)]
    return []


def _reached(schema_of: Schema, sections: Schema) -> Iterator[str]:
    """The sections in the order in which a reader from the top meets them, each once."""
    seen: set[str] = set()
    waiting = list(_named(schema_of))
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        yield name
        waiting[:0] = list(_named(sections[name]))


def _named(section: Schema) -> Iterator[str]:
    """The sections that the keys of a section refer to."""
    for field in section["properties"].values():
        yield from _inside(field)


def _inside(field: Schema) -> Iterator[str]:
    for form in forms(field):
        name = section_of(form)
        if name is not None:
            yield name
        for inner in ("items", "additionalProperties"):
            if isinstance(form.get(inner), dict):
                yield from _inside(form[inner])


def _where(name: str, found: Schema) -> str:
    """The places where a section stands: the keys that refer to it."""
    owners = {"": found, **found["$defs"]}
    places = [
        f"`{key}`" + (f" of {owner}" if owner else "")
        for owner, section in owners.items()
        for key, field in section["properties"].items()
        if name in set(_inside(field))
    ]
    return f"At {', '.join(places)}. "


def main() -> None:
    """Write the page to standard output."""
    sys.stdout.write(document())


if __name__ == "__main__":
    main()
