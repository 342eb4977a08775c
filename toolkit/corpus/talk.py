"""What a corpus holds: conversations as turns. Everything after loading works on these."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "text"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance. The role `text` is running text without speakers (format `text`): the only turn of its talk."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Talk:
    """One conversation: its turns in order, where it came from (`file:line`), and the label when it is a labelled
    text.
    """

    turns: tuple[Turn, ...]
    source: str
    label: str | None = None
    lang: str | None = None
