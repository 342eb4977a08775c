"""A conversation is known again by its words, whatever stood around them."""

import unicodedata

from toolkit.corpus.known import mark, marks
from toolkit.corpus.talk import Talk, Turn


def talk(*said: str, system: str = "") -> Talk:
    turns = tuple(Turn("user" if at % 2 == 0 else "assistant", text) for at, text in enumerate(said))
    return Talk((Turn("system", system), *turns) if system else turns, "어디서:1")


def test_system_turns_spaces_case_and_normal_forms_change_nothing() -> None:
    plain = talk("오늘 뭐 먹지?", "Tacos!")
    assert mark(talk("오늘  뭐 먹지?\n", "tacos!", system="친구처럼")) == mark(plain)
    assert mark(talk(unicodedata.normalize("NFD", "오늘 뭐 먹지?"), "Tacos!")) == mark(plain)


def test_other_words_and_other_cuts_between_turns_are_other_talk() -> None:
    cut = [("가나", "다"), ("가", "나다"), ("가나다",), ("가나", "라")]
    assert len({mark(talk(*said)) for said in cut}) == len(cut)


def test_marks_stand_once_and_in_order() -> None:
    found = marks([talk("비 온다", "우산!"), talk("a", "b"), talk("비 온다", "우산!", system="x")])
    assert found == sorted(found) and len(found) == 2
