"""openapi.json: what the routes take and answer, for people and for tools. docs/openapi.json is checked against it.

Bodies are read by serve/reading.py, not by FastAPI, so their schemas are put in here.
"""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.admin import Named
from serve.feedback import Feedback
from serve.schemas import Chat, Classify, Completion

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completion,
    "/v1/classify": Classify,
    "/v1/feedback": Feedback,
    "/admin/load": Named,
    "/admin/unload": Named,
    "/admin/reload": Named,
}
_STREAMED = ("/v1/chat/completions", "/v1/completions")
_OPEN = ("/healthz", "/readyz")
_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def filled(found: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's description of the routes, with bodies, errors and keys put in."""
    _, defined = models_json_schema([(model, "validation") for model in BODIES.values()], ref_template=_REF)
    components = found.setdefault("components", {})
    components["schemas"] = {**defined["$defs"], "Error": _ERROR}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            _fill(path, method, operation)
    return found


def _fill(path: str, method: str, operation: dict[str, Any]) -> None:
    if path in BODIES and method == "post":
        schema = {"$ref": _REF.format(model=BODIES[path].__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if path not in _OPEN:
        operation["security"] = [{"key": []}, {}]
    responses = operation["responses"]
    responses.pop("422", None)
    for one in responses.values():
        one.setdefault("content", {"application/json": {"schema": {}}})
    if path in _STREAMED:
        responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    if path == "/metrics":
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    responses["default"] = {"description": "Why there is no answer, in OpenAI's shape", "content": error}
