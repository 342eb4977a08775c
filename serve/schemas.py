"""What requests may say, field by field as OpenAI's API names them.

Everything is bounded here. A field of OpenAI's that this version does not have is refused unless it asks for nothing;
one that cannot change the answer is taken and reported as unused.
"""

import functools
import re
import unicodedata
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from serve.reading import Strict, read_model, without
from toolkit.grammar import JSON_OBJECT, GrammarError, check_schema

N_MESSAGES = 256
N_STOPS = 4
N_CHOICES = 16
N_TOP = 20
N_BIASED = 300
N_MEMBERS = 16
N_TEXTS = 64
N_LABELS = 64
CONVERSATION = r"^[A-Za-z0-9_-]{16,64}$"

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
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": ([],),
    "function_call": ("none",),
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
WITHOUT_IN_COMPLETION: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "response_format": ({"type": "text"},),
}

_TOKEN_ID = re.compile(r"[0-9]{1,7}")


class Message(Strict):
    """One turn. Text parts are joined as they are."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str = Field(description="text, or a list of {type: text, text: …}")

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: object) -> object:
        return without(value, WITHOUT_IN_MESSAGE)

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


class Options(Strict):
    """What only this server has.

    mix and vote: who answers, where `model` says mix or vote. over: what a mixture averages. truncation: auto leaves
    out the oldest turns of a conversation that does not fit. conversation: the client's own id of it, for deleting what
    was stored of it later.
    """

    mix: dict[str, float] | None = Field(None, min_length=1, max_length=N_MEMBERS)
    over: Literal["logprob", "prob"] | None = None
    vote: list[str] | None = Field(None, min_length=1, max_length=N_MEMBERS)
    truncation: Literal["auto", "disabled"] | None = None
    conversation: str | None = Field(None, pattern=CONVERSATION)

    @model_validator(mode="after")
    def _agrees(self) -> "Options":
        if self.mix is not None and self.vote is not None:
            raise PydanticCustomError("invalid", "mix and vote exclude each other")
        if self.over is not None and self.mix is None:
            raise PydanticCustomError("invalid", "over: only with mix")
        return self


class JsonSchema(Strict):
    """The form of an answer, which is kept to whatever `strict` says."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    wanted: dict[str, Any] = Field(alias="schema", description="a JSON Schema")
    description: str | None = Field(None, max_length=10_000)
    strict: bool | None = None


class ResponseFormat(Strict):
    """What an answer looks like: any text, any JSON object, or JSON that satisfies a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("missing", "json_schema is missing: name and schema of what the answer has to be")
        if self.type != "json_schema" and self.json_schema is not None:
            raise PydanticCustomError("invalid", "json_schema: only where type is json_schema")
        try:
            _ = self.text
        except GrammarError as error:
            raise PydanticCustomError("invalid", "{says}", {"says": str(error).removesuffix(".")}) from None
        return self

    @functools.cached_property
    def text(self) -> str | None:
        """The JSON Schema that an answer satisfies; None for any text."""
        if self.json_schema is None:
            return JSON_OBJECT if self.type == "json_object" else None
        return check_schema(self.json_schema.wanted)


class Sampled(Strict):
    """What requests for an answer share. `maltu.unused` of the answer names what was taken and has no effect."""

    model: str = Field(min_length=1, max_length=1000)
    n: int | None = Field(None, ge=1, json_schema_extra={"maximum": N_CHOICES}, description="answers, side by side")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0.0, le=2.0, description="0 always takes the likeliest token")
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    top_k: int | None = Field(None, ge=0, le=10**6, description="0: all")
    min_p: float | None = Field(None, ge=0.0, lt=1.0)
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(None, gt=0.0, le=10.0, description="1 changes nothing")
    logit_bias: dict[str, float] | None = Field(None, max_length=N_BIASED, description="token id to -100 … 100")
    max_tokens: int | None = Field(None, ge=1)
    stop: list[str] | None = Field(None, max_length=N_STOPS, description=f"a string, or at most {N_STOPS}")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    maltu: Options | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

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

    @field_validator("max_tokens", "max_completion_tokens", "n", check_fields=False)
    @classmethod
    def _bounded(cls, value: int | None, info: ValidationInfo) -> int | None:
        limit = N_CHOICES if info.field_name == "n" else (info.context or {}).get("max_tokens")
        if value is not None and limit is not None and value > limit:
            raise PydanticCustomError("integer_above_max_value", "at most {limit} here", {"limit": limit})
        return value

    @field_validator("logit_bias")
    @classmethod
    def _biased(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token, bias in (value or {}).items():
            if not _TOKEN_ID.fullmatch(token) or not -100.0 <= bias <= 100.0:
                raise PydanticCustomError("invalid", "maps token ids, as strings, to numbers from -100 to 100")
        return value

    @model_validator(mode="after")
    def _streams(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid", "stream_options: only where stream is true")
        return self

    @property
    def bias(self) -> dict[int, float]:
        """What is added to the logits of which tokens."""
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def unused(self) -> list[str]:
        """What was sent and has no effect."""
        found = [name for name in UNUSED if getattr(self, name) is not None]
        hides = self.stream_options is not None and self.stream_options.include_obfuscation
        return [*found, *(["stream_options.include_obfuscation"] if hides else [])]


class Chat(Sampled):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=N_MESSAGES)
    response_format: ResponseFormat | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=N_TOP)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: object) -> object:
        return without(value, WITHOUT)

    @model_validator(mode="after")
    def _agrees(self) -> "Chat":
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError("invalid", "max_tokens and max_completion_tokens disagree; send one")
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("invalid", "top_logprobs: only where logprobs is true")
        return self

    @property
    def form(self) -> str | None:
        """The JSON Schema that the answer satisfies, where one is asked for."""
        return self.response_format.text if self.response_format is not None else None

    @property
    def limit(self) -> int | None:
        """The tokens asked for, under either name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        """How many likeliest tokens beside the chosen one; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Sampled):
    """A request to /v1/completions: running text that goes on, without the template of a conversation."""

    prompt: list[str] = Field(min_length=1, max_length=N_CHOICES, description="a string, or several")
    logprobs: int | None = Field(None, ge=0, le=N_TOP)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: object) -> object:
        return without(value, WITHOUT_IN_COMPLETION)

    @field_validator("prompt", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        if isinstance(value, list) and value and all(isinstance(one, int | list) for one in value):
            raise PydanticCustomError("unsupported", "only text, no token ids")
        return [value] if isinstance(value, str) else value

    @field_validator("prompt")
    @classmethod
    def _said(cls, value: list[str]) -> list[str]:
        if not all(value):
            raise PydanticCustomError("invalid", "an empty prompt leaves nothing to go on from")
        return [unicodedata.normalize("NFC", text) for text in value]

    @model_validator(mode="after")
    def _few(self) -> "Completion":
        if len(self.prompt) * (self.n or 1) > N_CHOICES:
            raise PydanticCustomError("invalid", f"prompts times n: at most {N_CHOICES}")
        return self

    @property
    def form(self) -> str | None:
        """None: OpenAI's API has no response_format here."""
        return None

    @property
    def limit(self) -> int | None:
        """The tokens asked for."""
        return self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        """See Chat."""
        return self.logprobs


class Classify(Strict):
    """A request to /v1/classify: which label each text has. labels: those to choose from, where not the run's own."""

    model: str = Field(min_length=1, max_length=1000)
    input: list[str] = Field(min_length=1, max_length=N_TEXTS, description="a text, or several")
    labels: list[str] | None = Field(None, min_length=2, max_length=N_LABELS)

    @field_validator("input", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("input", "labels")
    @classmethod
    def _said(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        composed = [unicodedata.normalize("NFC", text) for text in value or ()]
        if not all(text.strip() for text in composed):
            raise PydanticCustomError("invalid", "none of them may be empty")
        if info.field_name == "labels" and (
            len(set(composed)) < len(composed) or any(len(label) > 100 for label in composed)
        ):
            raise PydanticCustomError("invalid", "different labels, each of at most 100 characters")
        return composed if value is not None else None


def read_chat(body: bytes, max_tokens: int) -> Chat:
    """See reading.read_model."""
    return read_model(Chat, body, max_tokens=max_tokens)


def read_completion(body: bytes, max_tokens: int) -> Completion:
    """See reading.read_model."""
    return read_model(Completion, body, max_tokens=max_tokens)


def _text_of(part: object) -> str:
    """The text of one content part."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) and len(part) == 2:
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError("unsupported", "only text parts are in this version")
    raise PydanticCustomError("invalid", "a content part is {type: text, text: …}")
