"""Chat templates: compiled once, run in a sandbox, and read for where each answer lies in what they write.

Every turn's words are handed to the template between marks, characters that Unicode keeps for use inside a program;
the marks survive trimming and joining, so what comes out shows where each turn went, whatever the template does
around it. No torch, no tokens here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from json import dumps
from typing import TYPE_CHECKING

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from toolkit.errors import BaseError, MaltuError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An answer's words, any other turn's words, a {% generation %} block, and text in which a control token stays plain
# text.
ANSWER, ANSWER_END, OTHER, OTHER_END, MADE, MADE_END, PLAIN, PLAIN_END = (chr(0xFDD0 + i) for i in range(8))
_MARKS = re.compile("[\ufdd0-\ufdd7]")
_SKIPPED = f"[\\s{ANSWER}{ANSWER_END}{OTHER}{OTHER_END}{MADE}{MADE_END}]*"

# Templates may write today's date; a prompt must not change from one day to the next, so it is always this one.
_TODAY = datetime(2024, 7, 26)

Message = dict[str, str]


class TemplateRefusal(MaltuError):
    """The template will not write these turns: the message says why, in the template's own words."""


@dataclass(frozen=True)
class Shape:
    """What a template writes around an answer, learned by letting it write a few turns.

    opening: what a prompt ends with to ask for an answer (may be empty). gap: what stands between it and the answer's
    first word. end: the token that ends an answer. control: the tokens that must stay plain text when somebody types
    them.
    """

    opening: str
    gap: str
    end: str
    control: tuple[str, ...]
    has_generation: bool
    takes_system: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer in a marked text: the model makes [start, close), of which [start, end) are words and the rest is
    the end token.

    words: where the turn's own words begin. is_learned: False where the template has {% generation %} marks, but none
    around this one.
    """

    start: int
    words: int
    end: int
    close: int
    is_learned: bool


class ChatTemplate:
    """A template that can write turns: compiled once, sandboxed, with the tokenizer's special tokens as variables."""

    def __init__(self, text: str, variables: Mapping[str, str]) -> None:
        self.text = text
        self._variables = dict(variables)
        try:
            self._compiled = _environment().from_string(text)
        except jinja2.TemplateError as error:
            raise BaseError(
                f"the chat template cannot be read as Jinja: {error}. Repair its chat_template.jinja."
            ) from None

    def write(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The marked text of these messages; `prompt` adds what asks for an answer. Raises TemplateRefusal."""
        try:
            return self._compiled.render(
                messages=list(messages), add_generation_prompt=prompt, tools=None, documents=None, **self._variables
            )
        except jinja2.exceptions.SecurityError as error:
            raise BaseError(f"the chat template reaches outside its sandbox ({error}). Do not use this base.") from None
        except Exception as error:  # a template is somebody else's program: anything it does wrong is a refusal
            raise TemplateRefusal(str(error) or type(error).__name__) from None


class _Generation(Extension):
    """The {% generation %} block: what it writes stands between marks."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 declares a mutable class attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return MADE + caller() + MADE_END


class _Namespace(jinja2.utils.Namespace):
    """A namespace that keeps no name with an underscore in front: such names reach into Python."""

    def __init__(*args: object, **values: object) -> None:  # positional only: a template may store `self`
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: object) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"it stores {name!r} on a namespace")


def _environment() -> ImmutableSandboxedEnvironment:
    """The names that templates for transformers expect, in a sandbox; the clock stands still."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    def new_dict(**entries: object) -> dict[str, object]:  # the class itself would hand its methods to the template
        return entries

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=_TODAY.strftime, dict=new_dict, namespace=_Namespace
    )
    return environment


def open_template(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[ChatTemplate, Shape]:
    """A template ready to write with this tokenizer's special tokens, and what it writes around an answer.

    Raises BaseError where it cannot be read, does not nest, or ends no answer.
    """
    variables = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    template = ChatTemplate(text, variables)
    added = {str(token.content): bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
    return template, read_shape(template, added, tokenizer.eos_token)


def control_pattern(control: Sequence[str]) -> re.Pattern[str]:
    """Finds any of these tokens, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")


def plain(text: str, control: re.Pattern[str]) -> str:
    """`text` as somebody typed it, with marks around what would otherwise be read as a control token."""
    return control.sub(lambda found: PLAIN + found[0] + PLAIN_END, unmarked(text))


def message(role: str, content: str, control: re.Pattern[str]) -> Message:
    """One turn for `ChatTemplate.write`, its words between marks; white space around them is left out."""
    words = plain(content.strip(), control)
    words = ANSWER + words + ANSWER_END if role == "assistant" else OTHER + words + OTHER_END
    return {"role": role, "content": words}


def unmarked(text: str) -> str:
    """`text` without any mark."""
    return _MARKS.sub("", text)


def find_answers(text: str, shape: Shape) -> list[Answer]:
    """Every answer in a marked text, in order. Raises BaseError where one does not stand right after its prompt."""
    answers, at = [], text.find(ANSWER)
    while at >= 0:
        end = text.find(ANSWER_END, at)
        start = _start(text, at, shape) if end >= 0 else None
        if start is None:
            raise BaseError(_DOES_NOT_NEST)
        closing = re.compile(_SKIPPED + re.escape(shape.end)).match(text, end)
        is_made = text.rfind(MADE, 0, at) > text.rfind(MADE_END, 0, at)
        answers.append(
            Answer(start, at + 1, end, closing.end() if closing else end, is_made or not shape.has_generation)
        )
        at = text.find(ANSWER, end)
    return answers


def check_nesting(template: ChatTemplate, messages: Sequence[Message], shape: Shape) -> None:
    """Raises BaseError unless the prompt for every answer is how the text of the whole talk begins."""
    text = template.write(messages, prompt=False)
    at_answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    answers = find_answers(text, shape)
    if len(answers) != len(at_answers):
        raise BaseError(_DOES_NOT_NEST)
    for i, answer in zip(at_answers, answers, strict=True):
        if i and unmarked(template.write(messages[:i], prompt=True)) != unmarked(text[: answer.start]):
            raise BaseError(_DOES_NOT_NEST)


def read_shape(template: ChatTemplate, added: Mapping[str, bool], eos: str | None) -> Shape:
    """Learn what the template writes around an answer, from made-up turns of one, two and three rounds.

    added: the tokenizer's added tokens, and whether each is special. Raises BaseError where what it writes for a
    prompt is not how the whole talk begins, where answers have no end token, or where it refuses a plain talk of user
    and assistant.
    """
    special = [token for token, is_special in added.items() if is_special and token.strip()]
    pattern = control_pattern(special)
    rounds = [message(role, f"{role} 가나{i}다", pattern) for i in range(3) for role in ("user", "assistant")]
    try:
        opening, gap, whole = _around_answer(template, rounds)
        every = control_pattern([token for token in (*added, *([eos] if eos else [])) if token.strip()])
        found = re.compile(f"{_SKIPPED}({every.pattern})").match(whole, whole.find(ANSWER_END))
        if not found:
            raise BaseError(
                "its chat template ends an answer without a token of its own, so no answer would ever stop. "
                "Put a chat_template.jinja that ends each answer with the end token into a local copy of the base."
            )
        written = every.findall(unmarked(template.write(rounds[:3], prompt=True)))
        control = tuple(dict.fromkeys((*special, *written, found[1])))
        shape = Shape(opening, gap, found[1], control, MADE in whole, _takes_system(template, rounds))
        for n in (2, 4, 6):
            check_nesting(template, rounds[:n], shape)
    except TemplateRefusal as refusal:
        raise BaseError(f"its chat template refuses a talk of user and assistant turns: {refusal}") from None
    return shape


def _around_answer(template: ChatTemplate, rounds: Sequence[Message]) -> tuple[str, str, str]:
    """(opening, gap, marked text) of the first round; BaseError where the prompt is not how the round begins."""
    closed, asked = (unmarked(template.write(rounds[:1], prompt=prompt)) for prompt in (False, True))
    whole = template.write(rounds[:2], prompt=False)
    at = whole.find(ANSWER)
    head = unmarked(whole[:at])
    if at < 0 or not head.startswith(asked):
        raise BaseError(_DOES_NOT_NEST)
    # A template may also write something where no answer is asked for: what both have in common is the turn itself.
    pairs = zip(closed, asked, strict=False)
    alike = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(closed), len(asked)))
    opening, gap = asked[alike:], head[len(asked) :]
    made = whole.rfind(MADE, 0, at)
    if gap.strip() and (made < 0 or len(unmarked(whole[:made])) > len(asked)):
        raise BaseError(_DOES_NOT_NEST)  # the answer opens with what no prompt has and no mark says is learned
    return opening, gap, whole


def _takes_system(template: ChatTemplate, rounds: Sequence[Message]) -> bool:
    system = {"role": "system", "content": f"{OTHER}system 가나다{OTHER_END}"}
    try:
        return system["content"] in template.write([system, *rounds[:2]], prompt=False)
    except TemplateRefusal:
        return False


def _start(text: str, at: int, shape: Shape) -> int | None:
    """Where the model takes over before the answer whose words begin at `at`: at the end of the prompt."""
    start = _before(text, at, shape.gap)
    if start is not None and _before(text, start, shape.opening) is not None:
        return start
    made = text.rfind(MADE, 0, at)
    if made > text.rfind(MADE_END, 0, at) and _before(text, made, shape.opening) is not None:
        return made
    return None


def _before(text: str, at: int, expected: str) -> int | None:
    """The place from which `text` reads `expected` up to `at`, marks left out; None where it reads something else."""
    for character in reversed(expected):
        at -= 1
        while at >= 0 and _MARKS.match(text, at):
            at -= 1
        if at < 0 or text[at] != character:
            return None
    return at


_DOES_NOT_NEST = (
    "its chat template does not nest: a prompt is not how the whole talk begins (templates that strip earlier thinking "
    "do this), so training and serving would disagree. Put a chat_template.jinja with {% generation %} around each "
    "answer and its end token into a local copy of the base, or delete the template there so that Maltu's own is used."
)
