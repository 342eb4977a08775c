"""What a chat request may say, field by field as OpenAI's API names them, and what an answer looks like.

Everything is bounded here. A field of OpenAI's that this version does not have is refused unless it asks for nothing;
one that cannot change the answer is taken and reported as unused.
"""

import json
import re
import unicodedata
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from serve.refusal import Refusal, unsupported

N_MESSAGES = 256
N_STOPS = 4

# Fields that cannot change an answer here.
UNUSED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)

# OpenAI's fields that this version does not have, each with the values that ask for nothing (null always does).
WITHOUT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}
WITHOUT_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": (),
    "audio": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "annotations": ([],),
}

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Strict(BaseModel):
    """Every part of a request: no field it does not know, no type but the named one, no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Message(Strict):
    """One turn. Text parts are joined as they are."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str = Field(description="text, or a list of {type: text, text: …}")

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: object) -> object:
        return _without(value, WITHOUT_IN_MESSAGE)

    @field_validator("role", mode="before")
    @classmethod
    def _known_role(cls, value: object) -> object:
        if value in ("tool", "function"):
            raise PydanticCustomError("unsupported", "messages of tools are not in this version")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: object) -> object:
        return "".join(map(_text_of, value)) if isinstance(value, list) else value

    @field_validator("content")
    @classmethod
    def _compose(cls, value: str) -> str:
        return unicodedata.normalize("NFC", value)


class StreamOptions(Strict):
    """How a stream is told."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Chat(Strict):
    """A request to /v1/chat/completions. `maltu.unused` of the answer names what was taken and has no effect."""

    model: str = Field(min_length=1, max_length=200)
    messages: list[Message] = Field(min_length=1, max_length=N_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0.0, le=2.0, description="0 always takes the likeliest token")
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="the older name of max_completion_tokens")
    stop: list[str] | None = Field(None, max_length=N_STOPS, description=f"a string, or at most {N_STOPS}")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: object) -> object:
        return _without(value, WITHOUT)

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _short(cls, value: list[str] | None) -> list[str] | None:
        if any(not 1 <= len(stop) <= 200 for stop in value or ()):
            raise PydanticCustomError("invalid", "each has 1 to 200 characters")
        return value

    @field_validator("max_tokens", "max_completion_tokens")
    @classmethod
    def _bounded(cls, value: int | None, info: ValidationInfo) -> int | None:
        limit = (info.context or {}).get("max_tokens")
        if value is not None and limit is not None and value > limit:
            raise PydanticCustomError("integer_above_max_value", "at most {limit} here", {"limit": limit})
        return value

    @model_validator(mode="after")
    def _agrees(self) -> "Chat":
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError("invalid", "max_tokens and max_completion_tokens disagree; send one")
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid", "stream_options: only where stream is true")
        return self

    @property
    def limit(self) -> int | None:
        """The tokens asked for, under either name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def unused(self) -> list[str]:
        """What was sent and has no effect."""
        found = [name for name in UNUSED if getattr(self, name) is not None]
        hides = self.stream_options is not None and self.stream_options.include_obfuscation
        return [*found, *(["stream_options.include_obfuscation"] if hides else [])]


def read_chat(body: bytes, max_tokens: int) -> Chat:
    """A request from its bytes. Raises Refusal: 400, with the first problem as param and code, all in the message."""
    payload = read_json(body)
    if not isinstance(payload, dict):
        raise Refusal(400, "The body is not a JSON object.", "invalid_json")
    try:
        return Chat.model_validate(payload, context={"max_tokens": max_tokens})
    except ValidationError as error:
        _refuse(error.errors(include_url=False))


def read_json(body: bytes) -> Any:
    """Strict JSON in UTF-8: no NaN, no endless nesting. Raises Refusal: 400 invalid_json."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_no_number)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # fails on one half of a pair, which is no character
        return value
    except UnicodeError:
        raise Refusal(400, "The body is not UTF-8 all through.", "invalid_json") from None
    except RecursionError:
        raise Refusal(400, "The body nests too deeply.", "invalid_json") from None
    except ValueError as error:
        raise Refusal(400, f"The body is not JSON: {error}.", "invalid_json") from None


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _without(value: object, absent: dict[str, tuple[Any, ...]]) -> object:
    """`value` less the fields that ask for nothing. Raises where one asks for what this version does not have."""
    if not isinstance(value, dict):
        return value
    for name, nothings in absent.items():
        asked = value.get(name)
        if asked is not None and not any(_is_same(asked, nothing) for nothing in nothings):
            says = f"only {json.dumps(nothings[0])} is in this version" if nothings else "not in this version"
            raise PydanticCustomError("without", says, {"name": name})
    return {name: inner for name, inner in value.items() if name not in absent}


def _is_same(value: object, other: object) -> bool:
    return type(value) is type(other) and value == other


def _text_of(part: object) -> str:
    """The text of one content part."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) and len(part) == 2:
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError("unsupported", "only text parts are in this version")
    raise PydanticCustomError("invalid", "a content part is {type: text, text: …}")


_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unsupported_parameter",
    "unsupported": "unsupported_parameter",
    "without": "unsupported_parameter",
    "integer_above_max_value": "integer_above_max_value",
}


def _refuse(errors: list[ErrorDetails]) -> NoReturn:
    problems = [(_where(error), _says(error), error["type"]) for error in errors]
    param, _, kind = problems[0]
    shown = "; ".join(f"{where}: {says}" if where else says for where, says, _ in problems[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    if _CODES.get(kind) == "unsupported_parameter":
        raise unsupported(param, f"{shown}{more}.")
    raise Refusal(400, f"{shown}{more}.", _CODES.get(kind, "invalid_value"), param or None)


def _where(error: ErrorDetails) -> str:
    """The place of a problem as OpenAI writes it: messages[0].content."""
    place = [*error["loc"], *([error["ctx"]["name"]] if error["type"] == "without" else [])]
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).removeprefix(".")


def _says(error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        return "no field of this API"
    says = error["msg"]
    return says[:1].lower() + says[1:]
