"""docs/reference/recipe.md says what the sections of a recipe say."""

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.recipe.fields import default_of, range_of, table, type_of
from toolkit.recipe.reference import document
from toolkit.recipe.show import schema

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "recipe.md"


def test_the_page_is_what_the_sections_say() -> None:
    remedy = "run: python -m toolkit.recipe.reference > docs/reference/recipe.md"
    assert PAGE.read_text(encoding="utf-8") == document(), remedy


def test_every_section_and_every_key_stands_on_it() -> None:
    page, found = document(), json.loads(schema())
    assert len(found["$defs"]) > 25
    for name, section in found["$defs"].items():
        assert f"\n### {name}\n" in page
        part = page.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
        assert [key for key in section["properties"] if f"| `{key}` |" not in part] == []


@pytest.mark.parametrize(
    ("field", "kind", "bounds"),
    [
        ({"type": "integer", "minimum": 1, "exclusiveMaximum": 4}, "whole number", "≥ 1, < 4"),
        ({"anyOf": [{"type": "number", "maximum": 1}, {"type": "null"}]}, "number; or `null`", "≤ 1"),
        ({"oneOf": [{"const": "all"}, {"type": "number", "minimum": 2}]}, "`all` or number", "number: ≥ 2"),
        ({"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1}, "list of (`a` or `b`)", "at least 1 item"),
        ({"$ref": "#/$defs/Train"}, "[Train](#train)", ""),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "map to text", ""),
        ({}, "anything", ""),
    ],
)  # fmt: skip
def test_a_field_in_words(field: dict[str, Any], kind: str, bounds: str) -> None:
    assert (type_of(field), range_of(field)) == (kind, bounds)


@pytest.mark.parametrize(
    ("default", "said"),
    [(3.0, "`3.0`"), (1e-4, "`0.0001`"), ("2x", "`2x`"), ("{text}", '`"{text}"`'), (None, "`null`"), (["a"], "`[a]`")],
)
def test_a_default_as_a_recipe_writes_it(default: object, said: str) -> None:
    assert default_of("key", {"default": default}, []) == said
    assert default_of("key", {"default": default}, ["key"]) == "(required)"


def test_a_cell_cannot_break_its_table() -> None:
    assert table(("a",), [("x|y",)]).splitlines()[-1] == r"| x\|y |"
