"""Rows to turns: one reader for each shape a row may have.

Every reader takes the row's object and gives its turns; BadRowError says what is wrong with one row, in words for its
author. Content is text, a list of text parts (joined by line ends), never an image, a tool call or null.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

from toolkit.corpus.row import MAX_ROW, cut
from toolkit.corpus.talk import Role, Turn
from toolkit.recipe.model import Columns, Labels

Format: TypeAlias = str | Columns | Labels
Value: TypeAlias = Mapping[str, object]

ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
SHAPES = {
    "messages": '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
    "alpaca": '{"instruction": "…", "input": "… or empty", "output": "…"}',
    "prompt_completion": '{"prompt": "…", "completion": "…"} (text, or lists of messages)',
    "text": '{"text": "…"}',
}
SPEAKERS: Mapping[Role, str] = {"user": "A", "assistant": "B"}

_HALF = re.compile("[\ud800-\udfff]")


class BadRowError(ValueError):
    """What is wrong with one row."""


def read_messages(row: Value) -> list[Turn]:
    """`messages` or `conversations`: turns as role/content or from/value; a top-level `system` text comes first."""
    key = "messages" if "messages" in row else "conversations"
    if key not in row:
        raise BadRowError(f"has no 'messages' and no 'conversations', but {_keys(row)}")
    turns = read_turns(row[key], key)
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not (turns and turns[0].role == "system"):
        turns.insert(0, Turn("system", read_text(system, "system")))
    return turns


def read_alpaca(row: Value) -> list[Turn]:
    """`instruction`, `input` (joined by a line end), `output`; earlier pairs in `history`, a `system` text first."""
    turns = [Turn("system", read_text(row["system"], "system"))] if row.get("system") else []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadRowError(f"history is {_kind(history)}, not a list of [question, answer] pairs")
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError(f"history.{number} is not a [question, answer] pair")
        turns.append(Turn("user", read_text(pair[0], f"history.{number}.0")))
        turns.append(Turn("assistant", read_text(pair[1], f"history.{number}.1")))
    asked = read_text(_need(row, "instruction"), "instruction")
    more = read_text(row["input"], "input") if row.get("input") is not None else ""
    turns.append(Turn("user", f"{asked}\n{more}" if asked.strip() and more.strip() else asked or more))
    turns.append(Turn("assistant", read_text(_need(row, "output"), "output")))
    return turns


def read_prompt_completion(row: Value) -> list[Turn]:
    """`prompt` and `completion`, each a text or a list of messages."""
    turns: list[Turn] = []
    roles: dict[str, Role] = {"prompt": "user", "completion": "assistant"}
    for key, role in roles.items():
        value = _need(row, key)
        if isinstance(value, list) and not _are_parts(value):
            turns.extend(read_turns(value, key))
        else:
            turns.append(Turn(role, read_text(value, key)))
    return turns


def read_plain(row: Value) -> list[Turn]:
    """`text`: running text without speakers, one turn of the role `text`."""
    return [Turn("text", read_text(_need(row, "text"), "text"))]


READERS: Mapping[str, Callable[[Value], list[Turn]]] = {
    "messages": read_messages,
    "sharegpt": read_messages,
    "alpaca": read_alpaca,
    "prompt_completion": read_prompt_completion,
    "text": read_plain,
}


def read_columns(row: Value, columns: Columns) -> list[Turn]:
    """The named columns as one exchange; a missing value (null) is empty and left to cleaning."""
    user, assistant = read_cell(row, columns.user), read_cell(row, columns.assistant)
    return [Turn("user", user), Turn("assistant", assistant)]


def read_labels(row: Value, labels: Labels) -> tuple[list[Turn], str]:
    """The text in its template as the user's turn, the label's word as the answer; and that word."""
    raw = _label_text(find(row, labels.label), labels.label)
    names = {_label_text(key, "names"): word for key, word in (labels.names or {}).items()}
    if names and raw not in names and raw not in names.values():
        known = ", ".join(f"{key}: {word}" for key, word in names.items())
        raise BadRowError(f"the label {raw!r} is not one of data.format.names ({cut(known)})")
    word = names.get(raw, raw)
    text = read_cell(row, labels.text)
    asked = (labels.template or "{text}").replace("{text}", text) if text.strip() else ""
    return [Turn("user", asked), Turn("assistant", word)], word


def _label_text(value: object, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    text = read_text(value, where).strip()
    if not text:
        raise BadRowError(f"{where} is empty: every row needs a label")
    return text


def find(row: Value, path: str) -> object:
    """The value at a dotted path: keys of objects, integers (negative from the end) into lists. Raises BadRowError."""
    if path in row:
        return row[path]
    value: object = row
    walked: list[str] = []
    for step in path.split("."):
        place = ".".join(walked) or "the row"
        if isinstance(value, Mapping):
            if step not in value:
                raise BadRowError(f"{place} has no {step!r}, but {_keys(value)} (asked for {path})")
            value = value[step]
        elif isinstance(value, list):
            if not step.removeprefix("-").isdecimal():
                raise BadRowError(f"{place} is a list, so {step!r} of {path} must be a number")
            if not -len(value) <= int(step) < len(value):
                raise BadRowError(f"{place} has {len(value)} entries, so there is no {step} (asked for {path})")
            value = value[int(step)]
        else:
            raise BadRowError(f"{place} is {_kind(value)}, so there is no {step!r} in it (asked for {path})")
        walked.append(step)
    return value


def read_cell(row: Value, path: str) -> str:
    """The text at a dotted path; null is empty, a list of messages becomes lines of "A: …" (user) and "B: …"."""
    value = find(row, path)
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and not _are_parts(value):
        turns = read_turns(value, path)
        return "\n".join(f"{SPEAKERS[turn.role]}: {turn.content}" for turn in turns if turn.role in SPEAKERS)
    return read_text(value, path)


def read_turns(value: object, where: str) -> list[Turn]:
    """A list of messages as turns. Raises BadRowError for what is not one, for unknown roles and for tool calls."""
    if isinstance(value, str):  # csv has no lists: JSON in a cell
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRowError(f"{where} is text, not a list of turns") from None
    if not isinstance(value, list):
        raise BadRowError(f"{where} is {_kind(value)}, not a list of turns")
    if not value:
        raise BadRowError(f"{where} is an empty list")
    return [_read_turn(turn, f"{where}.{number}") for number, turn in enumerate(value)]


def _read_turn(turn: object, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise BadRowError(f"{where} is {_kind(turn)}, not an object with 'role' and 'content'")
    said = turn.get("role", turn.get("from"))
    key = "value" if "content" not in turn and "value" in turn else "content"
    if said is None:
        raise BadRowError(f"{where} has no 'role' (or 'from'), but {_keys(turn)}")
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if said in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        raise BadRowError(f"{where} is a tool call or its result; tools are not in this version. Take such rows out")
    if role is None:
        raise BadRowError(f"{where} has the role {cut(repr(said), 40)}; known are {', '.join(ROLES)}")
    if turn.get("weight") == 0:
        raise BadRowError(f"{where} has weight 0 (not to be learnt), which is not in this version. Take the turn out")
    if key not in turn:
        raise BadRowError(f"{where} has no 'content' (or 'value'), but {_keys(turn)}")
    return Turn(role, read_text(turn[key], f"{where}.{key}"))


def read_text(value: object, where: str) -> str:
    """A content as text: itself, or its text parts joined by line ends. Raises BadRowError for anything else."""
    if isinstance(value, list):
        value = "\n".join(_read_part(part, f"{where}.{number}") for number, part in enumerate(value))
    if value is None:
        raise BadRowError(f"{where} is null; write text, or take the row out")
    if not isinstance(value, str):
        raise BadRowError(f"{where} is {_kind(value)}, not text")
    if len(value) > MAX_ROW:
        raise BadRowError(f"{where} is {len(value):,} characters long; no utterance is. Split it into several rows")
    if not value.isascii() and _HALF.search(value):
        raise BadRowError(f"{where} holds half a character (such as \\ud83d alone): an export cut an emoji in two")
    return value


def _read_part(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise BadRowError(f"{where} is {_kind(part)}, not a part such as {{'type': 'text', 'text': '…'}}")
    if part["type"] not in ("text", "input_text", "output_text"):
        raise BadRowError(f"{where} is of type {part['type']!r}; this version reads text alone. Take the row out")
    return read_text(part.get("text"), f"{where}.text")


def _are_parts(value: list[object]) -> bool:
    return bool(value) and all(isinstance(part, Mapping) and "type" in part and "role" not in part for part in value)


def _need(row: Value, key: str) -> object:
    if key not in row:
        raise BadRowError(f"has no {key!r}, but {_keys(row)}")
    return row[key]


def _keys(row: Value) -> str:
    return cut(", ".join(repr(key) for key in row), 120) if row else "nothing at all"


def _kind(value: object) -> str:
    kinds: dict[type, str] = {
        type(None): "null",
        str: "text",
        list: "a list",
        dict: "an object",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")
