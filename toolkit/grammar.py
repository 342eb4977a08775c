"""Answers that have to be JSON of a given form: which tokens may come next, as llguidance says.

A schema is judged by its size before anything is made of it, and what is made of it stays inside LIMITS: no schema and
no pattern costs more than they allow, neither when it is compiled nor at any token. Nothing is ever fetched.
"""

# V vocabulary, N tokens that the tokenizer knows.

import json
import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import MaltuError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

JSON_OBJECT = '{"type":"object"}'

MAX_SCHEMA = 2**16  # bytes
MAX_DEPTH = 32
MAX_PARTS = 5000  # objects, lists and values
MAX_ENUM = 1000  # values of all enums
MAX_PATTERN = 500  # characters
MAX_PATTERNS = 64  # and formats
MAX_MEETING = 8  # of them, where some may hold of the same text: what both allow is costly to find
MAX_DIVISOR = 10_000
MAX_REACH = 600  # depths of all references: llguidance follows them on the stack, and 5000 ended the process
MAX_LEAST = 10_000  # what an answer has to have of something: no answer that fits would hold more

# What llguidance may spend: about 20 ms on a grammar, 5 ms on a token, 20 MB on what it has seen of a text.
LIMITS: dict[str, int] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_items_in_row": 5000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
}
# On one line: small models that may begin a new one go on doing that.
_WORDING: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_SCHEMA, _VALUE = "(schema)", "(value)"
_NAMING = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # what stands there is named
_DATA = ("const", "enum", "default", "examples", "example")  # under them stand values, not schemas
_PATTERNS = ("pattern", "format")
_DEMANDS = frozenset(_PATTERNS) | {
    "allOf", "type", "properties", "additionalProperties", "items", "prefixItems", "const", "enum", "required",
    "minLength", "maxLength", "minimum", "maximum", "multipleOf",
}  # fmt: skip
_LEAST = ("minItems", "minLength", "minProperties", "minContains")
_PROBE = '{"기분": ["좋음", 1.5e3, "뷁 👩‍🌾 é\\n"], "a_b": {}}'


class GrammarError(MaltuError):
    """A schema that cannot be followed, costs too much, or goes beyond what this tokenizer can say."""

    exit_code = 2


def check_schema(schema: object) -> str:
    """A JSON Schema as text, once it is known to be of bounded size. Raises GrammarError with what is too much of it.

    Whether every keyword is known is found when it is compiled.
    """
    if not isinstance(schema, dict):
        raise GrammarError("the schema is no JSON object.")
    n_enum, n_patterns, reach, meets = 0, 0, 0, False
    divisors: list[object] = [1]
    for n_parts, (where, key, value, depth) in enumerate(_parts(schema), 1):
        if n_parts > MAX_PARTS:
            raise GrammarError(f"the schema has more than {MAX_PARTS} parts. Make it smaller.")
        if depth > MAX_DEPTH:
            raise GrammarError(f"{where}: nests more than {MAX_DEPTH} deep. Make it flatter.")
        _check_part(where, key, value)
        n_enum += len(value) if key == "enum" and isinstance(value, list) else 0
        n_patterns += len(value) if key == "patternProperties" and isinstance(value, dict) else key in _PATTERNS
        meets |= key == "allOf" or (key == _SCHEMA and isinstance(value, dict) and _is_met(value))
        divisors += [value] if key == "multipleOf" else []
        reach += depth if key == "$ref" else 0
    if n_enum > MAX_ENUM:
        raise GrammarError(f"the schema has more than {MAX_ENUM} values in enums. Leave some out.")
    if n_patterns > (MAX_MEETING if meets else MAX_PATTERNS):
        says = f"more than {MAX_MEETING} of them where some may hold together (allOf, $ref beside others)"
        raise GrammarError(f"the schema has {n_patterns} patterns and formats: {says if meets else 'too many'}.")
    if reach > MAX_REACH:
        raise GrammarError("the schema has too many references, which may lead on and on. Write some of them out.")
    _check_divisors(divisors)
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode()) > MAX_SCHEMA:
        raise GrammarError(f"the schema has more than {MAX_SCHEMA} bytes. Make it smaller.")
    return text


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llguidance knows it; made once for a base, at about a tenth of a second for 10,000 tokens."""

    tokenizer: "LLTokenizer"
    eos: int


def bridge(tokenizer: Any) -> Vocabulary:
    """A tokenizer of transformers for llguidance: byte-level BPE, and those that spell unknown signs as bytes.

    Raises: GrammarError for one that writes text in another way (WordPiece, say), or names no token that ends a text.
    """
    from llguidance.hf import from_tokenizer

    eos = tokenizer.eos_token_id
    try:  # where there is no end, any token does to see how text is spelled
        bridged = from_tokenizer(tokenizer, eos_token=0 if eos is None else int(eos), slices=None)
    except Exception as error:  # whatever llguidance does not know of it
        raise GrammarError(_unbridged(tokenizer, str(error))) from None
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    if bridged.decode_bytes(ids).decode("utf-8", "replace").removeprefix(" ") != _PROBE:
        raise GrammarError(_unbridged(tokenizer, "text does not come back from its tokens as it was"))
    if eos is None:
        raise GrammarError(
            "answers of a given form need a token that ends a text, and the tokenizer of this base names none. Set "
            "eos_token in its tokenizer_config.json."
        )
    return Vocabulary(bridged, int(eos))


class Grammar:
    """A schema, compiled for a tokenizer. Raises: GrammarError for what is not followed, and for what costs too much.

    The first token is looked for at once: what no answer satisfies is refused here.
    """

    def __init__(self, vocabulary: Vocabulary, schema: str) -> None:
        self._vocabulary = vocabulary
        self._matcher = _compiled(vocabulary, schema)
        Guide(self._matcher.deep_copy(), vocabulary.eos, frozenset()).look()

    def start(self, ends: AbstractSet[int]) -> "Guide":
        """The way of one answer. ends: ids that end it; they can be said where it may end, and nowhere else."""
        return Guide(self._matcher.deep_copy(), self._vocabulary.eos, ends)


class Guide:
    """Which tokens an answer may go on with, token by token."""

    def __init__(self, matcher: "LLMatcher", eos: int, ends: AbstractSet[int]) -> None:
        self._matcher, self._eos, self._ends = matcher, eos, ends
        self._n_said = 0

    def mask(self, n_vocabulary: int) -> NDArray[np.bool_]:
        """Whether each token may come now, [V]. Raises GrammarError where none can be said, or it costs too much."""
        found_N = self.look()
        may_V = np.zeros(n_vocabulary, dtype=np.bool_)
        n_both = min(n_vocabulary, len(found_N))
        may_V[:n_both] = found_N[:n_both]
        own = [end for end in {*self._ends, self._eos} if end < n_vocabulary]
        may_V[own] = False
        if found_N[self._eos]:
            may_V[[end for end in self._ends if end < n_vocabulary]] = True
        if not may_V.any():
            raise GrammarError(f"{self._so_far()} no token can follow. Allow something simpler.")
        return may_V

    def look(self) -> NDArray[np.bool_]:
        """What may come now, of the tokens that the tokenizer knows, [N]. Raises GrammarError as `mask` does."""
        try:
            bits = self._matcher.compute_bitmask()
            error = self._matcher.get_error()
        except Exception as broken:  # of llguidance's, whatever it is
            bits, error = b"", str(broken) or type(broken).__name__
        if error:
            raise GrammarError(f"{self._so_far()} it cannot be followed: {_says(error)}")
        found_N = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little").view(np.bool_)
        if not found_N.any():
            raise GrammarError(f"{self._so_far()} nothing satisfies it.")
        return found_N

    def take(self, token: int) -> bool:
        """A token was said; whether the answer is whole with it, and nothing can follow."""
        self._n_said += 1
        return self._matcher.consume_token(token) and self._matcher.is_stopped() and not self._matcher.is_error()

    def _so_far(self) -> str:
        return f"after {self._n_said} tokens" if self._n_said else "the schema:"


def _parts(schema: object) -> Iterator[tuple[str, str, object, int]]:
    """Every part of a schema: where it stands, under which keyword, itself, and how deep.

    The keyword is _SCHEMA for a schema that a name or a list leads to, and _VALUE inside mere values: a name of a
    property is no keyword, though it may be called like one.
    """
    left: list[tuple[str, str, object, int]] = [("schema", _SCHEMA, schema, 0)]
    while left:
        where, key, part, depth = left.pop()
        yield where, key, part, depth
        is_value = key == _VALUE or key in _DATA
        if isinstance(part, dict):
            own = _VALUE if is_value else _SCHEMA if key in _NAMING else None
            left += [(f"{where}.{name[:40]}", own or name, inner, depth + 1) for name, inner in part.items()]
        elif isinstance(part, list):
            own = _VALUE if is_value else _SCHEMA
            left += [(f"{where}[{place}]", own, inner, depth + 1) for place, inner in enumerate(part)]


def _check_part(where: str, key: str, value: object) -> None:
    """Refuse one part that is too much."""
    if key == "pattern" and isinstance(value, str) and len(value) > MAX_PATTERN:
        raise GrammarError(f"{where}: more than {MAX_PATTERN} characters. Say it in a shorter pattern.")
    if key == "patternProperties" and isinstance(value, dict) and any(len(name) > MAX_PATTERN for name in value):
        raise GrammarError(f"{where}: one has more than {MAX_PATTERN} characters. Say it in a shorter pattern.")
    if key in _LEAST and isinstance(value, int | float) and value > MAX_LEAST:
        raise GrammarError(f"{where}: {value} is more than an answer holds. Ask for at most {MAX_LEAST}.")
    if key == "$ref" and isinstance(value, str) and not value.startswith("#"):
        raise GrammarError(f"{where}: only references inside the schema are followed, as in #/$defs/name.")
    if key == "x-guidance":
        raise GrammarError(f"{where}: is no keyword of JSON Schema. Leave it out.")


def _is_met(schema: dict[str, Any]) -> bool:
    """Whether what one of its keywords leads to has to hold together with others beside it."""
    leads = schema.keys() & {"$ref", "anyOf", "oneOf"}
    return len(leads) > 1 or bool(leads and schema.keys() & _DEMANDS) or "patternProperties" in schema


def _check_divisors(divisors: Sequence[object]) -> None:
    """Refuse numbers whose multiples llguidance would count for long: it keeps a state for every remainder."""
    numbers = [one for one in divisors if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(numbers) < len(divisors) or not all(1e-9 <= one <= MAX_DIVISOR for one in numbers):
        raise GrammarError(f"multipleOf: is no number from 0.000000001 to {MAX_DIVISOR}. Take a rounder one.")
    try:
        exact = [Decimal(str(one)) for one in numbers]
        places = max(-int(one.normalize().as_tuple().exponent) for one in exact)
        if not 0 <= places <= 9 or not math.lcm(*(int(one.scaleb(places)) for one in exact)) <= MAX_DIVISOR:
            raise GrammarError(f"multipleOf: all of them together lead beyond {MAX_DIVISOR}. Take rounder numbers.")
    except (ArithmeticError, ValueError):
        raise GrammarError("multipleOf: is no number.") from None


def _compiled(vocabulary: Vocabulary, schema: str) -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(**LIMITS, verbose_errors=False)  # type: ignore[arg-type]
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_WORDING)  # type: ignore[arg-type]
        matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=limits)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust's
            raise
        raise GrammarError(f"the schema cannot be followed: {_says(str(error))}") from None
    if matcher.is_error():
        raise GrammarError(f"the schema cannot be followed: {_says(matcher.get_error())}")
    return matcher


def _says(error: str) -> str:
    """llguidance's words on one line."""
    words = " ".join(error.replace("<non-verbose/>", "").split())
    return f"{words[:300]}. Say it in another way, or leave it out."


def _unbridged(tokenizer: Any, why: str) -> str:
    name = type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", tokenizer)).__name__
    return (
        f"answers of a given form need a tokenizer that spells every text in bytes (byte-level BPE, or byte fallback); "
        f"the {name} tokenizer of this base does not ({' '.join(why.split())[:200]})."
    )
