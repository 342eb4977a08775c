"""How a text is typed, beside what it says: how long a turn is, its marks, its capitals, each as a numbered sign.

The signs are the same on every machine and count beside the pieces of words (route_features.py), which know neither
capitals nor lengths. A text in Latin letters alone has signs of its own.
"""

# C texts.

import math
import unicodedata
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

COUNTED = "?!.,"  # marks counted up to MOST
PRESENT = "…~^'\"-:;()ㅋㅎㅠㅜ"  # marks that are there or not
ENDS = "?!.,…~^)'\""  # marks that may end a turn; else another mark, or none
MOST, LONGEST, WORDS = 2, 19, 12  # counts, half powers of two of characters, words: more count as this many
SIZES = {
    "characters": LONGEST + 1,
    "words": WORDS + 1,
    "end": len(ENDS) + 2,
    "counted": len(COUNTED) * (MOST + 1),
    "present": len(PRESENT),
    "digits": 2,
    "first capital": 2,
    "later capital": 2,
    "I": 2,
    "i": 2,
}
N_SIGNS = 2 * sum(SIZES.values())  # for texts in Latin letters alone, and for all others
N_MANNERS = 4


def signs(text: str) -> list[int]:
    """The signs of every line of a text, each 0 to N_SIGNS - 1; none of a text without words."""
    offset = 0 if is_latin(text) else N_SIGNS // 2
    found = []
    for line in text.splitlines():
        if line := line.strip():
            starts = offset
            for of, size in zip(_signs_of(line), SIZES.values(), strict=True):
                found += [starts + sign for sign in of]
                starts += size
    return found


def _signs_of(line: str) -> Iterator[list[int]]:
    """One list for each entry of SIZES."""
    words = line.split()
    yield [min(LONGEST, int(2 * math.log2(len(line) + 1)))]
    yield [min(WORDS, len(words))]
    last = line[-1]
    yield [ENDS.index(last) if last in ENDS else len(ENDS) + int(last.isalnum())]
    yield [at * (MOST + 1) + min(MOST, line.count(mark)) for at, mark in enumerate(COUNTED)]
    yield [at for at, mark in enumerate(PRESENT) if mark in line]
    yield [int(any(letter.isdigit() for letter in line))]
    yield [int(line[0].isupper())]
    yield [int(any(word[0].isupper() and word != "I" for word in words[1:]))]
    bare = {word.split("'")[0].strip(".,!?") for word in words}
    yield [int("I" in bare)]
    yield [int("i" in bare)]


def is_latin(text: str) -> bool:
    """Whether all letters of a text are Latin ones; marks and digits, emoji and symbols do not count."""
    return text.isascii() or all(
        unicodedata.name(letter, "LATIN").startswith("LATIN") for letter in set(text) if letter.isalpha()
    )


def manners(texts: Sequence[str]) -> Tensor:
    """The manner of each text, 0 to N_MANNERS - 1, [C]: one turn or several, in Latin letters alone or not. Chances of
    texts of one manner are calibrated together.
    """
    return torch.tensor([2 * (not is_latin(text)) + ("\n" in text.strip()) for text in texts], dtype=torch.long)
