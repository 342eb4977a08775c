"""Schemas that explode only when they are compiled or followed: cut, or refused by name, and nothing else."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from serve.api import Bounds, create_app
from serve.engines.rows import RowsEngine

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "casual", "messages": [{"role": "user", "content": "오늘 뭐 먹지?"}]}


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def twice(n: int) -> dict[str, Any]:
    return {"allOf": [{"$ref": f"#/$defs/d{n}"}, {"$ref": f"#/$defs/d{n}"}]}


BOUNDED = {200, 400}  # an answer that was cut, or told that it would cost too much

BOMBS: list[tuple[dict[str, Any], set[int]]] = [
    ({"type": "string", "pattern": "(a{1,1000}){1,1000}"}, BOUNDED),
    ({"type": "string", "pattern": "((((((a{1,99}){1,99}){1,99}){1,99}){1,99}){1,99}){1,99}"}, BOUNDED),
    ({"type": "string", "pattern": "^(.*[가-힣].{0,400}[a-d].*){5}$"}, BOUNDED),
    ({"type": "string", "pattern": "^((a|b)*c){50}(x|y)*a[^q]{500}$"}, BOUNDED),
    ({"type": "string", "pattern": "^(?=(a+)+$)b"}, {400}),
    ({"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(60)]}, {400}),
    ({"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(8)]}, {400}),
    ({"type": "string", "pattern": "^(.*a.{200}b.*)*$", "minLength": 9000}, {400}),
    ({"type": "integer", "multipleOf": 99_999_989}, {400}),
    ({"type": "number", "multipleOf": "9e999998"}, {400}),
    ({"type": "integer", "multipleOf": 9973, "minimum": 3}, BOUNDED),
    ({"type": "array", "items": {"type": "string"}, "maxItems": 10**9}, BOUNDED),
    ({"type": "string", "maxLength": 10**300}, BOUNDED),
    ({"type": "integer", "minimum": -(10**300), "maximum": 10**300}, BOUNDED),
    ({"enum": [f"{n} {'값' * (n % 20)}" for n in range(1000)]}, {200}),
    ({"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(1000)}}, BOUNDED),
    ({"$ref": "#"}, {400}),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, {400}),
    ({"type": "object", "properties": {"가": {"$ref": "#"}}, "required": ["가"]}, BOUNDED),
    ({"allOf": [{"anyOf": [{"minLength": n}, {"maxLength": n + 50}]} for n in range(60)]}, BOUNDED),
    ({"$ref": "#/$defs/d0", "$defs": {f"d{n}": twice(n + 1) for n in range(24)} | {"d24": {}}}, BOUNDED),
]


@pytest.fixture(scope="module")
def shaping(bare: Any) -> Iterator[TestClient]:
    """A server that computes, for forms that are found too costly only when they are tried."""
    engine = RowsEngine(bare.models)
    with TestClient(create_app(engine, Bounds(100)), raise_server_exceptions=False) as client:
        yield client
    engine.close()


@pytest.mark.parametrize(("schema", "statuses"), BOMBS, ids=lambda value: ascii(value)[:40])
def test_a_schema_that_explodes_is_cut_or_refused_and_the_server_goes_on(
    shaping: TestClient, schema: dict[str, Any], statuses: set[int]
) -> None:
    response = shaping.post(CHAT, json=ASK | form(schema) | {"max_tokens": 30, "temperature": 1.5, "seed": 1})
    assert response.status_code in statuses
    if response.status_code == 400:
        assert response.json()["error"]["param"] == "response_format"
    assert shaping.post(CHAT, json=ASK | {"max_tokens": 2}).status_code == 200
