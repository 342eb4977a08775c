"""Stored feedback as rows to train on: what TRL's DPO and KTO trainers take as it is, and dialogues for a recipe.

preference: {prompt, chosen, rejected}, from pairs that have a winner and from corrections. kto: {prompt, completion,
label}, from thumbs, from both sides of pairs, and from corrections. sft: {messages}, from what was found good. All are
conversational: lists of {role, content}. Comments, keys and ids are left out.
"""

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any, Literal

from serve.store import Record

Format = Literal["preference", "kto", "sft"]
FORMATS: tuple[Format, ...] = ("preference", "kto", "sft")
Row = dict[str, Any]


def rows_of(record: Record, format: Format, model: str | None = None) -> Iterator[Row]:
    """The rows that one piece of feedback gives. model: only where an answer of it is judged.

    A run's name takes its experts along. What is worded alike on both sides teaches nothing and gives no row, and
    neither do empty words.
    """
    if model is not None and not any(_is_of(answer, model) for answer in record.payload["answers"]):
        return
    prompt = [_turn("system" if m["role"] == "developer" else m["role"], m["content"]) for m in _messages(record)]
    good, bad = _judged(record)
    if format == "preference":
        for better in good:
            for worse in bad:
                if better != worse:
                    yield {"prompt": prompt, "chosen": [_said(better)], "rejected": [_said(worse)]}
    elif format == "kto":
        for text, label in [*((text, True) for text in good), *((text, False) for text in bad)]:
            yield {"prompt": prompt, "completion": [_said(text)], "label": label}
    else:
        for text in good:
            yield {"messages": [*prompt, _said(text)]}


def write_rows(records: Iterable[Record], format: Format, file: IO[str], model: str | None = None) -> int:
    """Write JSON lines, each once; how many. Keeps a short hash of each in memory."""
    seen: set[int] = set()
    for record in records:
        for row in rows_of(record, format, model):
            line = json.dumps(row, ensure_ascii=False)
            if hash(line) not in seen:
                seen.add(hash(line))
                file.write(line + "\n")
    return len(seen)


def _judged(record: Record) -> tuple[list[str], list[str]]:
    """What was found good in it, and what was found bad."""
    said, payload = [answer["content"] for answer in record.payload["answers"]], record.payload
    good: list[str] = []
    bad: list[str] = []
    if record.kind == "thumb":
        (good if payload["value"] == "up" else bad).append(said[0])
    elif record.kind == "correction":
        good, bad = [payload["corrected"]], [said[0]]
    elif payload["winner"] == "both_bad":
        bad = said
    elif payload["winner"] != "tie":
        good, bad = (said[:1], said[1:]) if payload["winner"] == "a" else (said[1:], said[:1])
    return [text for text in good if text.strip()], [text for text in bad if text.strip()]


def _messages(record: Record) -> list[dict[str, str]]:
    return list(record.payload["messages"])


def _is_of(answer: dict[str, Any], model: str) -> bool:
    name = answer["model"] or ""
    return name == model or name.startswith(f"{model}/")


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _said(text: str) -> dict[str, str]:
    return _turn("assistant", text)
