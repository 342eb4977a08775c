"""One talk made fit to learn from: its text in one normal form, its turns in an order that every template takes.

Pure functions. The order: an opening system turn or none, then user and assistant in turn, an answer last.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from toolkit.corpus.talk import Turn

UnicodeForm = Literal["NFC", "NFKC", "none"]

# Removed: C0 and C1 controls, soft hyphen, zero-width space, byte order mark, direction marks, interlinear and object
# signs, noncharacters. Kept: the zero-width joiners, which hold emoji families and several scripts together.
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffc"
    "\ufdd0-\ufdef\ufffe\uffff]"
)
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_ODD_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000\u3164\uffa0]")
_PRINTABLE_YET_ODD = "\u3164\uffa0\ufffc"  # for str.isprintable; it knows every other sign above as not printable
_RUN_OF_SPACES = re.compile(r"(?<=\S)[ \t]+(?=\S)")
_SPACES_BEFORE_END = re.compile(r"(?<![ \t])[ \t]+$", re.MULTILINE)
_EMPTY_LINES = re.compile(r"\n{3,}")
_HANGUL = re.compile("[가-힣ㄱ-ㆎᄀ-ᇿ]+")
_LATIN = re.compile("[A-Za-zÀ-ɏ]+")
KOREAN_SHARE = 0.2


def tidy_text(text: str, form: UnicodeForm) -> str:
    r"""The text in its normal form, without control characters, with plain spaces and `\n` alone as a line end.

    Runs of spaces inside a line become one, the indentation of a line stays, several empty lines become one, nothing
    stands before or after. Running it twice changes nothing more.
    """
    normal = text if form == "none" or text.isascii() else unicodedata.normalize(form, text)
    if normal.isprintable() and "  " not in normal and not any(sign in normal for sign in _PRINTABLE_YET_ODD):
        return normal.strip()
    text = _CONTROL.sub("", _LINE_END.sub("\n", text))  # first: what they stood between may compose
    if form != "none":
        text = unicodedata.normalize(form, text)
    text = _ODD_SPACE.sub(" ", text)
    text = _SPACES_BEFORE_END.sub("", _RUN_OF_SPACES.sub(" ", text))
    return _EMPTY_LINES.sub("\n\n", text).strip()


def language_of(text: str) -> str:
    """`ko` where KOREAN_SHARE of the letters or more are Hangul, else `en` where there are Latin ones, else `other`.

    A guess by script alone, for rows that do not say their language: other languages in Latin letters count as `en`.
    """
    n_hangul = sum(map(len, _HANGUL.findall(text)))
    n_latin = sum(map(len, _LATIN.findall(text)))
    if n_hangul and n_hangul >= KOREAN_SHARE * (n_hangul + n_latin):
        return "ko"
    return "en" if n_latin else "other"


@dataclass(frozen=True)
class Settled:
    """A talk's turns in order; `reason` says why nothing is left of it; `fixed` names what was done to it."""

    turns: tuple[Turn, ...]
    reason: str | None
    fixed: tuple[str, ...]


def settle(turns: Sequence[Turn], min_turns: int) -> Settled:
    """Bring turns into the order that templates take, or say why the talk is dropped.

    Fixed, and counted: `empty_turns` (left out), `late_system` (a system turn after the talk began: the talk ends
    before it, because what follows may depend on it), `merged_turns` (turns of one speaker in a row become one, joined
    by line ends), `leading_answers` (answers to nobody) and `trailing_questions` (without an answer), both left out.
    Dropped: `empty`, `one_sided` (no question with an answer after it), `too_few_turns` (system turns do not count).
    """
    fixed: list[str] = []
    kept = [turn for turn in turns if turn.content]
    if len(kept) < len(turns):
        fixed.append("empty_turns")
    if any(turn.role == "text" for turn in kept):
        return Settled(tuple(kept), None, tuple(fixed))
    talk_start = next((place for place, turn in enumerate(kept) if turn.role != "system"), len(kept))
    system, talk = kept[:talk_start], kept[talk_start:]
    late = next((place for place, turn in enumerate(talk) if turn.role == "system"), None)
    if late is not None:
        fixed.append("late_system")
        talk = talk[:late]
    if not talk:
        return Settled((), "empty", ())
    first = next((place for place, turn in enumerate(talk) if turn.role == "user"), len(talk))
    last = max((place for place, turn in enumerate(talk) if turn.role == "assistant"), default=-1)
    if last < first:
        return Settled((), "one_sided", ())
    if first:
        fixed.append("leading_answers")
    if last + 1 < len(talk):
        fixed.append("trailing_questions")
    merged = _merge([*system, *talk[first : last + 1]])
    if len(merged) < len(system) + last + 1 - first:
        fixed.append("merged_turns")
    if sum(turn.role != "system" for turn in merged) < min_turns:
        return Settled((), "too_few_turns", ())
    return Settled(merged, None, tuple(fixed))


def _merge(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    groups = [list(group) for _, group in groupby(turns, key=lambda turn: turn.role)]
    return tuple(
        group[0] if len(group) == 1 else Turn(group[0].role, "\n".join(turn.content for turn in group))
        for group in groups
    )
