"""The page's words: the same in both languages, and a trouble told in the visitor's own."""

from types import SimpleNamespace
from typing import Any

import pytest

from serve.refusal import queue_full, stopping
from serve.ui.texts import COOKIE, TEXTS, Trouble, told


def visitor(language: str) -> Any:
    return SimpleNamespace(cookies={COOKIE: language}, headers={})


def test_both_languages_say_the_same_things() -> None:
    english, korean = TEXTS["en"], TEXTS["ko"]
    assert list(english) == list(korean) and len(english) > 60
    assert all(text.strip() for text in (*english.values(), *korean.values()))


@pytest.mark.parametrize("refusal", [queue_full(64, 2), stopping()], ids=lambda one: str(one.code))
def test_a_busy_server_is_told_in_the_visitors_language(refusal: Any) -> None:
    trouble = Trouble(refusal.message, refusal.code)
    for language in ("en", "ko"):
        says = told(trouble, visitor(language))
        assert says == f"⚠ {TEXTS[language][refusal.code]}"


def test_a_trouble_without_words_of_ours_is_told_as_the_server_says_it() -> None:
    assert told(Trouble("<b>boom</b>", "nobody_knows"), visitor("ko")) == "⚠ &lt;b&gt;boom&lt;/b&gt;"
