"""Private data in text: one table of rules, each with the look-alikes it must leave alone.

Masked: e-mail addresses, resident and foreigner registration numbers, card numbers, phone numbers of persons. Left
alone: prices, dates, versions, IP addresses, order numbers, helplines (109, 1388, 119) and numbers that only firms have
(1588-…, 080-…). What a rule cannot know: names, street addresses, bank accounts, numbers written out in words.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

_DASH = "[-‐‑‒–—―−－]"
_GAP = rf"(?: ?{_DASH} ?|[ .·])"
# A number stands alone: no digit touches it, not even across a hyphen or a point as in longer order numbers.
_HEAD = rf"(?<!\d)(?<!\d{_DASH})(?<!\d\.)(?<![A-Za-z_])"
_TAIL = rf"(?!\d)(?!{_DASH}\d)(?!\.\d)"
_NOT_MONEY = r"(?! ?(?:원|만원|억|달러|엔|유로|점|won\b|krw\b|usd\b|dollars?\b))"
# Nothing that a rule masks lacks an @ or this many digits close together.
_NARROW = {0xFF10 + digit: str(digit) for digit in range(10)} | {0xFF20: "@"}  # full-width digits and @
_MAY_HOLD = re.compile(r"[@＠]|\d(?:\D{0,3}\d){6}")


def _digits(text: str) -> list[int]:
    return [int(char) for char in text if char.isdecimal()]


def is_card(text: str) -> bool:
    """Whether it could be a payment card: 13 to 19 digits, an issuer's first ones, and the Luhn check digit."""
    digits = _digits(text)
    if not 13 <= len(digits) <= 19 or len(set(digits)) < 2:
        return False
    first = digits[0] * 1000 + digits[1] * 100 + digits[2] * 10 + digits[3]
    is_issued = digits[0] in (4, 6, 9) or 3400 <= first < 3900 or 5100 <= first < 5600 or 2221 <= first < 2721
    if not is_issued:
        return False
    doubled = [digit * 2 - 9 * (digit > 4) if place % 2 else digit for place, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def is_resident(text: str) -> bool:
    """Whether it could be a resident number: a date that exists; written without a hyphen, the check digit as well.

    Numbers given out since October 2020 have no check digit, so the hyphen is trusted instead.
    """
    digits = _digits(text)
    if not (1 <= digits[2] * 10 + digits[3] <= 12 and 1 <= digits[4] * 10 + digits[5] <= 31):
        return False
    if len(digits) == 7 or not text.isdecimal():
        return True
    weighed = sum(weight * digit for weight, digit in zip((2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5), digits, strict=False))
    base = 13 if digits[6] in (5, 6, 7, 8) else 11
    return digits[12] == (base - weighed % 11) % 10


def always(text: str) -> bool:
    """For rules whose pattern says it all."""
    return bool(text)


@dataclass(frozen=True)
class Rule:
    """One kind of private data: its pattern, a check on what the pattern found, and the word that takes its place."""

    name: str
    pattern: re.Pattern[str]
    check: Callable[[str], bool]
    korean: str
    english: str


RULES = (
    Rule(
        "email",
        re.compile(
            r"(?<![\w.%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])", re.ASCII
        ),
        always,
        "[이메일]",
        "[email]",
    ),
    Rule(
        "resident_number",
        re.compile(rf"{_HEAD}\d{{6}}(?: ?{_DASH} ?[1-8](?:\d{{6}}|[*xX●]{{6}})|[1-8]\d{{6}}){_TAIL}"),
        is_resident,
        "[주민번호]",
        "[id number]",
    ),
    Rule(
        "card",
        re.compile(
            rf"{_HEAD}(?:\d{{4}}(?P<gap>[ .]|{_DASH})\d{{4}}(?P=gap)\d{{4}}(?P=gap)\d{{1,4}}(?:(?P=gap)\d{{1,3}})?"
            rf"|\d{{4}}(?P<short>[ .]|{_DASH})\d{{6}}(?P=short)\d{{4,5}}|\d{{14,19}}){_TAIL}"
        ),
        is_card,
        "[카드번호]",
        "[card number]",
    ),
    Rule(
        "phone",  # +82 10-1234-5678, +1 (212) 555-0123
        re.compile(rf"(?<![\w+])\(?\+ ?[1-9](?:(?:[ .()]|{_DASH}){{0,2}}\d){{8,14}}{_TAIL}{_NOT_MONEY}"),
        always,
        "[전화번호]",
        "[phone number]",
    ),
    Rule(
        "phone",  # mobile: 010-1234-5678, 01012345678, 010)1234-5678, 82-10-1234-5678
        re.compile(rf"{_HEAD}(?:82{_GAP}?10|\(?01[016-9]\)?) ?{_GAP}?\d{{3,4}}{_GAP}?\d{{4}}{_TAIL}{_NOT_MONEY}"),
        always,
        "[전화번호]",
        "[phone number]",
    ),
    Rule(
        "phone",  # landline, internet and safe numbers: 02-123-4567, (031) 123-4567, 070-1234-5678, 0507-1234-5678
        re.compile(
            rf"{_HEAD}(?:\((?:02|0[3-6][1-5]|070|050\d)\) ?|(?:02|0[3-6][1-5]|070|050\d)(?:\) ?|{_GAP}))"
            rf"\d{{3,4}}{_GAP}\d{{4}}{_TAIL}"
        ),
        always,
        "[전화번호]",
        "[phone number]",
    ),
    Rule(
        "phone",  # North America: (212) 555-0123, 212-555-0123
        re.compile(rf"{_HEAD}(?:\([2-9]\d\d\) ?|[2-9]\d\d(?:{_DASH}|\.))[2-9]\d\d(?:{_DASH}|\.)\d{{4}}{_TAIL}"),
        always,
        "[전화번호]",
        "[phone number]",
    ),
)


@dataclass(frozen=True)
class Masked:
    """A text without its private data, how often each rule masked, and what it masked in a form to compare by."""

    text: str
    counts: Mapping[str, int]
    values: frozenset[str]


def mask(text: str, is_korean: bool, only: Iterable[str] | None = None) -> Masked:
    """Put a word such as [전화번호] in the place of private data. Masking twice changes nothing more.

    Full-width digits become plain ones where something is masked. `only` limits it to values that another call masked
    (Masked.values), however they are punctuated here.
    """
    if not _MAY_HOLD.search(text):
        return Masked(text, {}, frozenset())
    found = _mask(text.translate(_NARROW), is_korean, None if only is None else frozenset(only))
    return found if found.counts else Masked(text, {}, frozenset())


def _mask(text: str, is_korean: bool, wanted: frozenset[str] | None) -> Masked:
    counts: dict[str, int] = {}
    values: set[str] = set()

    def replace(rule: Rule, found: re.Match[str]) -> str:
        value = _compared(rule, found[0])
        if not rule.check(found[0]) or (wanted is not None and value not in wanted):
            return found[0]
        counts[rule.name] = counts.get(rule.name, 0) + 1
        values.add(value)
        return rule.korean if is_korean else rule.english

    for rule in RULES:
        text = rule.pattern.sub(lambda found, rule=rule: replace(rule, found), text)  # type: ignore[misc]
    return Masked(text, counts, frozenset(values))


def _compared(rule: Rule, value: str) -> str:
    if rule.name == "email":
        return value.lower()
    digits = "".join(map(str, _digits(value)))
    return f"0{digits[2:]}" if rule.name == "phone" and digits.startswith("82") else digits
