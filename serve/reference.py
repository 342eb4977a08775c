"""docs/reference/api.md, written from the server's own description, flags, refusals and metrics.

python -m serve.reference > docs/reference/api.md
"""

import ast
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from prometheus_client.parser import text_string_to_metric_families

from serve.api import describe_api
from serve.engines.contract import Engine, Load
from serve.metrics import Metrics
from serve.refusal import TYPES, Refusal
from serve.schemas import UNUSED, WITHOUT, WITHOUT_IN_COMPLETION, read_chat
from serve.settings import parser
from toolkit.recipe.fields import Schema, default_of, forms, range_of, section_of, table, type_of

_HEAD = """# The API

Written by `python -m serve.reference > docs/reference/api.md`; a test keeps it true. The same for machines is
`docs/openapi.json` (and `/openapi.json` of a running server). How it is meant to be used: [serving](../serving.md),
[clients](../clients.md). Bodies are JSON; unknown fields are refused. Where the server has keys, a call carries
`Authorization: Bearer KEY`: an API key for `/v1`, an admin key for `/admin`, either for `/metrics`."""
_REFUSED = """## Refusals

A request that is not answered gets `{"error": {"message": …, "type": …, "param": …, "code": …}}`: OpenAI's shape. 429
and 503 carry `Retry-After` (seconds). `…` stands for what the server fills in."""
_PROMETHEUS = """## Prometheus

What `/metrics` tells beside the process's own numbers (`process_…`, `python_…`). How to watch it:
[monitoring](../monitoring/README.md)."""


def document() -> str:
    """The page."""
    found = describe_api()
    sections = found["components"]["schemas"]
    routes = [
        f"### {method.upper()} {path}\n\n{_route(operation)}"
        for path, methods in sorted(found["paths"].items(), key=lambda one: _rank(one[0]))
        for method, operation in methods.items()
    ]
    reached = dict.fromkeys(name for operation in _operations(found) for name in _reached(_body(operation), sections))
    bodies = [f"### {name}\n\n{_section(sections[name])}" for name in reached]
    refused = [(str(status), f"`{code}`", says) for status, code, says in sorted(refusals())]
    parts = [
        _HEAD,
        "## Routes",
        *routes,
        "## Bodies",
        *bodies,
        _ignored(),
        _REFUSED,
        table(("status", "code", "message"), refused),
        "`type` is " + ", ".join(f"`{word}` with {status}" for status, word in TYPES.items()) + ", else"
        " `invalid_request_error` below 500 and `server_error` from there on.",
        "## Flags of `python -m serve RUN…`",
        table(("flag", "default", "what it says"), list(_flags())),
        "Every flag is also a variable: `--max-tokens 512` is `MALTU_MAX_TOKENS=512`.",
        _PROMETHEUS,
        table(("name", "kind", "labels", "what it says"), list(prometheus())),
    ]
    return "\n\n".join(parts) + "\n"


def _rank(path: str) -> tuple[int, str]:
    return (("/v1", "/admin").index(path[: path.index("/", 1)]) if path.count("/") > 1 else 2, path)


def _operations(found: Schema) -> Iterator[Mapping[str, Any]]:
    for _, methods in sorted(found["paths"].items(), key=lambda one: _rank(one[0])):
        yield from methods.values()


def _body(operation: Mapping[str, Any]) -> Schema:
    content = operation.get("requestBody", {}).get("content", {})
    return cast(Schema, content.get("application/json", {}).get("schema", {}))


def _route(operation: Mapping[str, Any]) -> str:
    """What a route does, takes and gives."""
    parts = [str(operation["description"])]
    body = section_of(_body(operation))
    statuses = ", ".join(status for status in operation["responses"] if status != "default")
    kinds = {kind for one in operation["responses"].values() for kind in one.get("content", ())}
    streamed = " (`text/event-stream` with `stream: true`)" if "text/event-stream" in kinds else ""
    taken = f"Body: [{body}](#{body.lower()}). " if body else ""
    parts.append(f"{taken}Answers {statuses}{streamed}, else a [refusal](#refusals).")
    given = operation.get("parameters", ())
    if given:
        rows = [
            (
                f"`{one['name']}`",
                one["in"],
                type_of(one["schema"]),
                default_of(one["name"], one["schema"], [one["name"]] if one["required"] else []),
                range_of(one["schema"]),
            )
            for one in given
        ]
        parts.append(table(("parameter", "in", "type", "default", "range"), rows))
    return "\n\n".join(parts)


def _section(section: Schema) -> str:
    """The fields of a body, or the bodies that it may be."""
    says = str(section.get("description", ""))
    if "properties" not in section:
        return f"{says}\n\n{type_of(section)}.".strip()
    required = list(section.get("required", ()))
    rows = [
        (f"`{name}`", type_of(field), default_of(name, field, required), range_of(field), field.get("description", ""))
        for name, field in section["properties"].items()
        if name not in UNUSED
    ]
    return f"{says}\n\n{table(('field', 'type', 'default', 'range', 'meaning'), rows)}"


def _reached(schema: Schema, sections: Schema) -> Iterator[str]:
    """The sections behind a schema, outermost first."""
    for form in forms(schema):
        name = section_of(form)
        if name is not None:
            yield name
            yield from _reached(sections[name], sections)
        inside = [form.get("items"), form.get("additionalProperties"), *form.get("properties", {}).values()]
        for one in inside:
            if isinstance(one, Mapping):
                yield from _reached(one, sections)


def _ignored() -> str:
    unused = ", ".join(f"`{name}`" for name in UNUSED)
    without = ", ".join(f"`{name}`" for name in (*WITHOUT, *WITHOUT_IN_COMPLETION))
    return (
        f"Taken without any effect, and listed in `maltu.unused` of the answer: {unused}.\n\n"
        f"OpenAI's, and refused unless they ask for nothing (null, an empty list): {without}."
    )


def _flags() -> Iterator[tuple[str, ...]]:
    for action in parser()._actions:  # argparse has no other list of what was added
        if not action.option_strings or action.dest == "help":
            continue
        flag = action.option_strings[-1] + (f" {action.metavar}" if action.metavar else "")
        says = str(action.help).partition(" (default:")[0]
        default = "off" if action.default is False else "–" if action.default is None else f"`{action.default}`"
        yield f"`{flag}`", default, says


def refusals() -> set[tuple[int, str, str]]:
    """(status, code, message) of every refusal that the server's source writes down, and of some wrong fields."""
    found = set(_of_fields())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                found |= set(_refusals_in(function))
    told = {one[:2] for one in found if _has_words(one[2])}
    return {one for one in found if _has_words(one[2]) or one[:2] not in told}


def _has_words(message: str) -> bool:
    """Whether more is known of a message than that something is filled in."""
    return any(sign.isalpha() for sign in message)


def _of_fields() -> Iterator[tuple[int, str, str]]:
    """What is said about a body with a wrong field: an example of each."""
    fair = {"model": "casual", "messages": [{"role": "user", "content": "안녕"}]}
    wrongs: list[dict[str, Any]] = [
        {"messages": []},
        {"temperature": 3},
        {"tools": [{}]},
        {"temprature": 1},
        {"n": 99},
    ]
    for body in ({}, *({**fair, **wrong} for wrong in wrongs)):
        try:
            read_chat(json.dumps(body).encode(), 100)
        except Refusal as refusal:
            yield refusal.status, str(refusal.code), f"as in: {refusal.message}"


def _refusals_in(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[int, str, str]]:
    said = [
        (target.id, node.lineno, node.value)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    for node in ast.walk(function):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refusal"):
            continue
        given = dict(zip(("status", "message", "code"), node.args, strict=False))
        given |= {one.arg: one.value for one in node.keywords if one.arg in ("status", "message", "code")}
        status, code, message = given.get("status"), given.get("code"), given.get("message")
        if not (isinstance(status, ast.Constant) and isinstance(code, ast.Constant)):
            continue  # handed on from elsewhere
        if isinstance(message, ast.Name):  # what it was called last before
            before = [(line, value) for name, line, value in said if name == message.id and line < node.lineno]
            message = max(before, key=lambda one: one[0])[1] if before else message
        yield int(str(status.value)), str(code.value), _text(message)


def _text(node: ast.expr | None) -> str:
    """A message as it is written, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "…"


def prometheus() -> Iterator[tuple[str, ...]]:
    """(name, kind, labels, meaning) of every metric of the server's own, once each was touched."""
    metrics = Metrics(cast(Engine, _Idle()), n_slots=1)
    metrics.count("route", "model", "ok", 0.0)
    metrics.tokens("model", 1, 1)
    metrics.change("load", "ok")
    metrics.feedback("thumb")
    watch = metrics.watch("model")
    watch.piece(0, "one")
    watch.piece(0, "two")
    for family in text_string_to_metric_families(metrics.text().decode()):
        if not family.name.startswith("maltu_") or family.name.endswith("_created"):
            continue
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
        name = f"{family.name}_total" if family.type == "counter" else family.name
        yield f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation


class _Idle:
    """As much of an engine as metrics look at."""

    def load(self) -> Load:
        return Load("ready", 0, 0)

    def models(self) -> Mapping[str, Any]:
        return {}


def main() -> None:
    """Write the page to standard output."""
    sys.stdout.write(document())


if __name__ == "__main__":
    main()
