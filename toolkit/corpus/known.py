"""What a run has learned, told from other talk later: a mark for each conversation, by its words alone."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from toolkit.corpus.talk import Talk


def mark(talk: Talk) -> str:
    """16 hexadecimal digits that follow from what was said, whoever's file it came from.

    System turns, normal forms, case and spaces change nothing: a conversation that was learned under another system
    turn has been learned. Private data that one run masked and another did not makes two of one conversation.
    """
    digest = hashlib.sha256()
    for turn in talk.turns:
        if turn.role != "system":
            text = unicodedata.normalize("NFKC", turn.content).casefold()
            digest.update(re.sub(r"\s+", " ", text).strip().encode() + b"\x00")
    return digest.hexdigest()[:16]


def marks(talks: Iterable[Talk]) -> list[str]:
    """The marks of some talk, each once, sorted."""
    return sorted({mark(talk) for talk in talks})
