"""Bytes of a request to a checked model of pydantic's, or a refusal that names what is wrong in it and where."""

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from serve.refusal import Refusal, unsupported

N_NESTED = 64  # brackets inside brackets

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', re.DOTALL)
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unsupported_parameter",
    "unsupported": "unsupported_parameter",
    "without": "unsupported_parameter",
    "integer_above_max_value": "integer_above_max_value",
}


class Strict(BaseModel):
    """Every part of a request: no field it does not know, no type but the named one, no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_Model = TypeVar("_Model", bound=BaseModel)


def read_model(kind: type[_Model], body: bytes, **context: Any) -> _Model:
    """A request from its bytes. Raises Refusal: 400, with the first problem as param and code, all in the message."""
    payload = read_json(body)
    if not isinstance(payload, dict):
        raise Refusal(400, "The body is not a JSON object.", "invalid_json")
    try:
        return kind.model_validate(payload, context=context)
    except ValidationError as error:
        n_outer = 1 if issubclass(kind, RootModel) else 0  # the tag of the union that it is
        refuse(error.errors(include_url=False), n_outer)


def read_json(body: bytes) -> Any:
    """Strict JSON in UTF-8: no NaN, no name twice, no endless nesting. Raises Refusal: 400 invalid_json."""
    if body.count(b"[") + body.count(b"{") > N_NESTED:
        _check_nesting(body)
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_no_number, object_pairs_hook=_named_once)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # fails on one half of a pair, which is no character
        return value
    except UnicodeError:
        raise Refusal(400, "The body is not UTF-8 all through.", "invalid_json") from None
    except ValueError as error:
        raise Refusal(400, f"The body is not JSON: {error}.", "invalid_json") from None


def without(value: object, absent: dict[str, tuple[Any, ...]]) -> object:
    """`value` less the fields that ask for nothing: null, or what `absent` names. Raises where one asks for what this
    version does not have.
    """
    if not isinstance(value, dict):
        return value
    for name, nothings in absent.items():
        asked = value.get(name)
        if asked is not None and not any(_is_same(asked, nothing) for nothing in nothings):
            says = f"only {json.dumps(nothings[0])} is in this version" if nothings else "not in this version"
            raise PydanticCustomError("without", says, {"name": name})
    return {name: inner for name, inner in value.items() if name not in absent}


def refuse(errors: Sequence[ErrorDetails], n_outer: int = 0) -> NoReturn:
    """Raises Refusal for what pydantic found. n_outer: how many places around the request are left out of names."""
    problems = [(_where(error, n_outer), _says(error), error["type"]) for error in errors]
    param, _, kind = problems[0]
    shown = "; ".join(f"{where}: {says}" if where else says for where, says, _ in problems[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    if _CODES.get(kind) == "unsupported_parameter":
        raise unsupported(param, f"{shown}{more}.")
    raise Refusal(400, f"{shown}{more}.", _CODES.get(kind, "invalid_value"), param or None)


def _check_nesting(body: bytes) -> None:
    depth = 0
    for token in _TOKENS.finditer(body):
        first = body[token.start()]
        depth += (first in b"[{") - (first in b"]}")
        if depth > N_NESTED:
            raise Refusal(400, f"The body nests more than {N_NESTED} deep.", "invalid_json")


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _is_same(value: object, other: object) -> bool:
    return type(value) is type(other) and value == other


def _where(error: ErrorDetails, n_outer: int) -> str:
    """The place of a problem as OpenAI writes it: messages[0].content."""
    place = [*error["loc"][n_outer:], *([error["ctx"]["name"]] if error["type"] == "without" else [])]
    shown = "".join(f"[{key}]" if isinstance(key, int) else f".{str(key)[:80]}" for key in place)
    return shown.removeprefix(".")


def _says(error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        return "no field of this API"
    says = error["msg"]
    return says[:1].lower() + says[1:]
