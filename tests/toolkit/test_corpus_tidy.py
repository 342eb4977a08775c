"""Text in one normal form, turns in an order that every template takes."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.corpus.talk import Turn
from toolkit.corpus.tidy import language_of, settle, tidy_text


def turns(text: str) -> list[Turn]:
    """`u:안녕 a:응` as turns; s, u, a, t for system, user, assistant, text."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "text"}
    return [Turn(roles[part[0]], part[2:]) for part in text.split()]  # type: ignore[arg-type]


def spelled(found: tuple[Turn, ...]) -> str:
    return " ".join(f"{turn.role[0]}:{turn.content}" for turn in found)


@pytest.mark.parametrize(
    ("text", "tidy"),
    [
        (unicodedata.normalize("NFD", "오늘 뭐 먹지?"), "오늘 뭐 먹지?"),
        ("  안녕\t\t반가워  ", "안녕 반가워"),
        ("하나\r\n둘\r셋\u2028넷", "하나\n둘\n셋\n넷"),
        ("하나   \n\n\n\n둘", "하나\n\n둘"),
        ("if x:\n    y  =  1", "if x:\n    y = 1"),
        ("안\ufffc녕\u3164친구", "안녕 친구"),
        ("안\u200b녕\ufeff\x00\x07", "안녕"),
        ("안녕\u00a0친구\u3000야\u3164", "안녕 친구 야"),
        ("\u202e거꾸로\u202c", "거꾸로"),
        ("e\u200b\u0301", "é"),
        ("👨\u200d👩\u200d👧 ❤\ufe0f", "👨\u200d👩\u200d👧 ❤\ufe0f"),
        ("plain text", "plain text"),
        ("", ""),
        (" \t\n", ""),
    ],
)
def test_text_gets_one_normal_form(text: str, tidy: str) -> None:
    assert tidy_text(text, "NFC") == tidy


def test_the_unicode_form_is_the_recipes_choice() -> None:
    decomposed = unicodedata.normalize("NFD", "①가")
    assert [tidy_text(decomposed, form) for form in ("NFC", "NFKC", "none")] == ["①가", "1가", decomposed]


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.text(st.sampled_from(" \t\n\r\u200b\u00a0\u3000\u0301\u1100\u1161e가a.\x00\u2028"), max_size=12)
    | st.text(max_size=20)
)
def test_tidying_twice_changes_nothing_more(text: str) -> None:
    once = tidy_text(text, "NFC")
    assert tidy_text(once, "NFC") == once
    assert unicodedata.is_normalized("NFC", once)


@pytest.mark.parametrize(
    ("text", "lang"),
    [
        ("오늘 뭐 먹지?", "ko"),
        ("ㅋㅋㅋ", "ko"),
        ("iPhone 샀어", "ko"),
        ("What is 김치 made of, and who eats it?", "en"),
        ("123", "other"),
    ],
)
def test_the_language_is_told_by_script(text: str, lang: str) -> None:
    assert language_of(text) == lang


@pytest.mark.parametrize(
    ("before", "after", "fixed"),
    [
        ("u:1 a:2", "u:1 a:2", ()),
        ("s:0 u:1 a:2", "s:0 u:1 a:2", ()),
        ("s:0 s:1 u:1 a:2", "s:0\n1 u:1 a:2", ("merged_turns",)),
        ("u:1 u:2 a:3 a:4", "u:1\n2 a:3\n4", ("merged_turns",)),
        ("u:1 a:2 u:3", "u:1 a:2", ("trailing_questions",)),
        ("a:0 u:1 a:2", "u:1 a:2", ("leading_answers",)),
        ("u:1 a: u:2 a:3", "u:1\n2 a:3", ("empty_turns", "merged_turns")),
        ("u:1 a:2 s:0 u:3 a:4", "u:1 a:2", ("late_system",)),
        ("t:x", "t:x", ()),
    ],
)
def test_turns_are_put_in_order_and_it_is_counted(before: str, after: str, fixed: tuple[str, ...]) -> None:
    found = settle(turns(before), min_turns=2)
    assert (spelled(found.turns), found.fixed, found.reason) == (after, fixed, None)


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("s:0", "empty"),
        ("u: a:", "empty"),
        ("u:1", "one_sided"),
        ("a:1", "one_sided"),
        ("a:1 u:2", "one_sided"),
        ("u:1 s:0 a:2", "one_sided"),
        ("s:0 u:1 u:2 a:3", "too_few_turns"),
    ],
)
def test_what_cannot_be_put_in_order_is_dropped_with_a_reason(before: str, reason: str) -> None:
    found = settle(turns(before), min_turns=3 if reason == "too_few_turns" else 2)
    assert (found.reason, found.turns) == (reason, ())
