"""How a text is typed: the signs of it, and the manners that are calibrated apart."""

import pytest

from toolkit.combine.route_style import N_MANNERS, N_SIGNS, is_latin, manners, signs

TEXTS = [
    "오늘 뭐 먹지?",
    "오늘 뭐 먹지",
    "오늘 뭐 먹지??",
    "오늘 뭐 먹지ㅋㅋ",
    "오늘은 우리 뭐 먹지?",
    "오늘 3시에 뭐 먹지?",
    "What is slope?",
    "what is slope?",
    "what is Slope?",
    "i wonder what is slope",
    "I wonder what is slope",
]


def test_every_way_of_typing_has_signs_of_its_own() -> None:
    found = [tuple(signs(text)) for text in TEXTS]
    assert len(set(found)) == len(TEXTS)
    assert all(0 <= sign < N_SIGNS for of in found for sign in of)


def test_the_last_sign_there_is_belongs_to_no_other_text() -> None:
    highest = max(sign for sign in signs("말 " * 400 + "i"))
    assert highest == N_SIGNS - 1
    assert max(signs("i " * 400)) == N_SIGNS // 2 - 1


def test_other_words_typed_alike_have_the_same_signs() -> None:
    assert signs("Why is ice cold?") == signs("Who ate my bun?")
    assert signs("밥 먹었어?") == signs("잠 잤었어?")


def test_every_line_has_its_signs_and_no_words_have_none() -> None:
    assert signs("밥 먹자\n어디서?") == signs("밥 먹자") + signs("어디서?")
    assert signs("") == signs(" \n ") == []


@pytest.mark.parametrize(
    ("text", "latin"), [("naïve café?", True), ("12 🙂 :)", True), ("", True), ("요리 is fun", False), ("мир", False)]
)
def test_the_script_is_told_by_letters(text: str, latin: bool) -> None:
    assert is_latin(text) is latin


def test_manners_are_the_script_and_whether_there_was_one_turn() -> None:
    found = manners(["hi", "hi\nwho are you", "안녕", "안녕\n누구야", ""]).tolist()
    assert found == [0, 1, 2, 3, 0] and max(found) < N_MANNERS
    assert manners([]).shape == (0,)
