"""What a text is judged by when it is asked how spoken it is: signs of either side, and character n-grams.

Punctuation and case count for nothing: a text scores the same with them and without. A sign is counted per word, so
that short and long texts meet on one scale.
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from toolkit.bases.spoken_signs import AT_THE_END, ENGLISH, KOREAN, SPOKEN, WRITTEN, Sign

Language = Literal["ko", "en"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
GRAMS: Mapping[Language, tuple[int, ...]] = {"ko": (2, 3, 4), "en": (3, 4, 5)}  # characters
LONG: Mapping[Language, tuple[int, int, int]] = {"ko": (1, 4, 6), "en": (3, 7, 10)}  # short, long, very long words
AROUND = 2  # words added to every count of words, so that a single one does not make an extreme rate

_APOSTROPHE = re.compile(r"(?<=[a-z])['’ʼ](?=[a-z])")
_NO_LETTER = re.compile(r"[^\w\x01]+|_+")
_HANGUL = re.compile("[가-힣ㄱ-ㆎᄀ-ᇿ]")
_LATIN = re.compile("[A-Za-zÀ-ɏ]")
HANGUL_SHARE, LATIN_SHARE = 0.2, 0.8  # of the letters

SIGNS: Mapping[Language, tuple[Sign, ...]] = {"ko": KOREAN, "en": ENGLISH}
LENGTHS = (("word length", WRITTEN), ("long words", WRITTEN), ("very long words", WRITTEN), ("short words", SPOKEN))
FAMILIAR, LEANING = "familiar n-grams", "leaning n-grams"
UNSEEN = math.log(0.5)  # what an n-gram that talk does not hold counts for; one that n dialogues hold: log(n + 0.5)
RESERVE = 5  # n-grams without a leaning that are added to those of a text


@dataclass(frozen=True)
class Tables:
    """What is known of n-grams: how many dialogues hold one (`familiar`, as a logarithm), and the logarithm of how much
    oftener it stands in speech than in writing that says the same (`leaning`).
    """

    familiar: Mapping[str, float]
    leaning: Mapping[str, float]


def language_of(text: str) -> Language | None:
    """`ko` where HANGUL_SHARE of the letters or more are Hangul, `en` where LATIN_SHARE are Latin, else None.

    By script alone: other languages in Latin letters count as `en`.
    """
    text = unicodedata.normalize("NFC", text)
    n_letters = sum(map(str.isalpha, text))
    if not n_letters:
        return None
    if len(_HANGUL.findall(text)) >= HANGUL_SHARE * n_letters:
        return "ko"
    return "en" if len(_LATIN.findall(text)) >= LATIN_SHARE * n_letters else None


def plain(text: str) -> str:
    """The text as it is judged: NFC, lower case, words alone (apostrophes inside them stay), every digit 0, a space
    at either end.
    """
    text = _APOSTROPHE.sub("\x01", unicodedata.normalize("NFC", text.replace("\x01", " ")).lower())
    text = re.sub(r"\d", "0", _NO_LETTER.sub(" ", text)).replace("\x01", "'")
    return f" {' '.join(text.split())} "


def grams(text: str, lang: Language) -> Iterator[str]:
    """The character n-grams of a plain text, spaces included, as often as they stand there."""
    for n in GRAMS[lang]:
        for start in range(len(text) - n + 1):
            yield text[start : start + n]


def numbers(text: str, lang: Language, tables: Tables) -> list[float]:
    """What a plain text is judged by, in the order of `names`."""
    of_text = list(grams(text, lang))
    return [*signs(text, lang), familiarity(of_text, tables.familiar), leaning(of_text, tables.leaning)]


def familiarity(of_text: Sequence[str], familiar: Mapping[str, float]) -> float:
    """The mean over a text's n-grams of how familiar each is from talk."""
    return sum(familiar.get(gram, UNSEEN) for gram in of_text) / len(of_text) if of_text else UNSEEN


def leaning(of_text: Sequence[str], leanings: Mapping[str, float]) -> float:
    """The mean leaning of the n-grams that have one; near 0 where few have."""
    known = [leanings[gram] for gram in of_text if gram in leanings]
    return sum(known) / (len(known) + RESERVE)


def signs(text: str, lang: Language) -> list[float]:
    """The signs of a plain text, in the order of `names`."""
    words = text.split()
    counts = [len(pattern.findall(text)) / (len(words) + AROUND) for pattern in _patterns(lang)]
    last = f" {words[-1]} " if words else ""
    at_end = [float(pattern.search(last) is not None) for pattern in _end_patterns(lang)]
    short, long, very_long = LONG[lang]
    lengths = [len(word) for word in words] or [0]
    n = len(lengths)
    return [
        *counts,
        *at_end,
        sum(lengths) / n,
        sum(length >= long for length in lengths) / n,
        sum(length >= very_long for length in lengths) / n,
        sum(length <= short for length in lengths) / n,
    ]


def names(lang: Language) -> list[str]:
    """What the numbers of a text are called: its signs, then the two that come from n-grams."""
    of_end = [f"last word: {name}" for name in _at_the_end(lang)]
    return [*(sign.name for sign in SIGNS[lang]), *of_end, *(name for name, _ in LENGTHS), FAMILIAR, LEANING]


def sides(lang: Language) -> list[int]:
    """For each of `names` the side it may speak for."""
    side_of = {sign.name: sign.side for sign in SIGNS[lang]}
    of_end = [side_of[name] for name in _at_the_end(lang)]
    return [*side_of.values(), *of_end, *(side for _, side in LENGTHS), SPOKEN, SPOKEN]


def _at_the_end(lang: Language) -> tuple[str, ...]:
    return AT_THE_END if lang == "ko" else ()


@cache
def _patterns(lang: Language) -> tuple[re.Pattern[str], ...]:
    return tuple(sign.regex for sign in SIGNS[lang])


@cache
def _end_patterns(lang: Language) -> tuple[re.Pattern[str], ...]:
    named = {sign.name: sign for sign in SIGNS[lang]}
    return tuple(named[name].regex for name in _at_the_end(lang))
