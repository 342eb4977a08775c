"""Cleaning: what is kept, what is dropped and why, what is masked, and that all of it is counted."""

import random
import unicodedata
from pathlib import Path

import pytest

from toolkit.corpus import clean, store
from toolkit.corpus.clean import Cleaned, clean_talks
from toolkit.corpus.talk import Talk, Turn
from toolkit.recipe.model import Clean

SYLLABLES = "가나다라마바사아자차하고노도로모보소오조기니디리미비시이지은는을를에서와과"


def talk(*contents: str, source: str = "a.jsonl:1", lang: str | None = None) -> Talk:
    roles = ("user", "assistant")
    turns = tuple(Turn(roles[place % 2], content) for place, content in enumerate(contents))  # type: ignore[arg-type]
    return Talk(turns, source, None, lang)


def cleaned(*talks: Talk, **options: object) -> Cleaned:
    return clean_talks(talks, Clean(**options), None)  # type: ignore[arg-type]


def contents(found: Cleaned) -> list[tuple[str, ...]]:
    return [tuple(turn.content for turn in talk.turns) for talk in found.talks]


def long_text(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(SYLLABLES, k=3)) for _ in range(20))


def test_clean_talk_is_kept_as_it_is_and_told_its_language() -> None:
    found = cleaned(talk("오늘 뭐 먹지?", "칼국수 어때?"), talk("what's for lunch?", "Noodles!"))
    assert contents(found) == [("오늘 뭐 먹지?", "칼국수 어때?"), ("what's for lunch?", "Noodles!")]
    assert [talk.lang for talk in found.talks] == ["ko", "en"]
    assert (found.report.loaded, found.report.kept, dict(found.report.dropped)) == (2, 2, {})


def test_the_language_a_row_names_is_believed() -> None:
    assert cleaned(talk("안녕", "bonjour", lang="fr")).talks[0].lang == "fr"


def test_decomposed_hangul_is_composed() -> None:
    assert contents(cleaned(talk(unicodedata.normalize("NFD", "점심"), "응"))) == [("점심", "응")]


def test_every_reason_is_counted_with_examples() -> None:
    found = cleaned(
        talk("", ""), talk("안녕"), talk("안녕", source="a.jsonl:3"), talk("하나", "둘"),
        talk("셋", "넷"), talk("셋", "넷 "),
    )  # fmt: skip
    assert dict(found.report.dropped) == {"empty": 1, "one_sided": 2, "exact_duplicate": 1}
    assert found.report.examples["one_sided"] == ("a.jsonl:1: 안녕", "a.jsonl:3: 안녕")
    assert (found.report.kept, found.report.damaged) == (2, 3)


def test_min_turns_drops_shorter_talk() -> None:
    found = cleaned(talk("하나", "둘"), talk("하나", "둘", "셋", "넷"), min_turns=4)
    assert (len(found.talks), dict(found.report.dropped)) == (1, {"too_few_turns": 1})


def test_running_text_needs_no_turns_and_no_other_side() -> None:
    found = cleaned(Talk((Turn("text", "비 오는 날"),), "a:1"), Talk((Turn("text", " \u200b"),), "a:2"))
    assert (contents(found), dict(found.report.dropped)) == ([("비 오는 날",)], {"empty": 1})


def test_what_was_done_to_turns_is_counted_by_talk() -> None:
    found = cleaned(talk("하나", "둘", "셋"), talk("넷", "다섯", "여섯", "일곱", "여덟"))
    assert dict(found.report.fixed) == {"trailing_questions": 2}


def test_the_first_of_equal_talks_is_kept() -> None:
    found = cleaned(talk("안녕", "어", source="a:1"), talk("안녕", "어", source="a:2"))
    assert [talk.source for talk in found.talks] == ["a:1"]


def test_the_same_words_from_the_other_side_are_no_duplicate() -> None:
    other = Talk((Turn("system", "안녕"), Turn("user", "어"), Turn("assistant", "응")), "a:2")
    assert len(cleaned(talk("안녕어", "응"), other).talks) == 2


def test_duplicates_stay_when_the_recipe_says_so_and_share_a_cluster() -> None:
    found = cleaned(talk("안녕", "어"), talk("잘 가", "응"), talk("안녕", "어"), duplicates="none")
    assert found.report.cluster.tolist() == [0, 1, 0]


def test_near_duplicates_are_dropped_from_the_threshold_up() -> None:
    texts = [long_text(1), long_text(2), long_text(1) + "요"]
    found = cleaned(*(talk(text, "그래") for text in texts))
    assert (len(found.talks), dict(found.report.dropped)) == (2, {"near_duplicate": 1})
    assert found.origin.tolist() == [0, 1]
    assert found.report.damaged == 0


def test_without_a_threshold_near_duplicates_stay_in_one_cluster() -> None:
    texts = [long_text(1), long_text(2), long_text(1) + "요"]
    found = cleaned(*(talk(text, "그래") for text in texts), near_duplicates=None)
    assert found.report.cluster.tolist() == [0, 1, 0]


def test_looser_talks_are_kept_and_share_a_cluster() -> None:
    texts = [long_text(1), long_text(2), long_text(1)[:70] + long_text(3)[:10]]
    found = cleaned(*(talk(text, "그래") for text in texts), near_duplicates=0.9)
    assert (len(found.talks), found.report.cluster.tolist()) == (3, [0, 1, 0])


def test_origin_says_where_a_kept_talk_came_from() -> None:
    found = cleaned(talk("안녕"), talk("하나", "둘"), talk("하나", "둘"), talk("셋", "넷"))
    assert found.origin.tolist() == [1, 3]


def test_user_turns_are_masked_and_counted_by_rule() -> None:
    found = cleaned(talk("내 번호 010-1234-5678, 메일 a@b.com", "저희는 02-123-4567이에요"))
    assert contents(found) == [("내 번호 [전화번호], 메일 [이메일]", "저희는 02-123-4567이에요")]
    assert dict(found.report.masked) == {"phone": 1, "email": 1}


def test_an_answer_that_repeats_the_users_number_is_masked_there() -> None:
    found = cleaned(talk("010-1234-5678로 전화 줘", "01012345678 맞으시죠? 저희는 02-123-4567이에요"))
    assert contents(found)[0][1] == "[전화번호] 맞으시죠? 저희는 02-123-4567이에요"
    assert dict(found.report.masked) == {"phone": 2}


@pytest.mark.parametrize(("whose", "n_masked"), [("none", 0), ("user", 1), ("all", 2)])
def test_the_recipe_says_whose_data_is_masked(whose: str, n_masked: int) -> None:
    found = cleaned(talk("내 번호 010-1234-5678", "저희는 02-123-4567이에요"), mask_private=whose)
    assert found.report.masked.get("phone", 0) == n_masked


def test_running_text_is_masked_like_a_user() -> None:
    assert contents(cleaned(Talk((Turn("text", "연락은 a@b.com"),), "a:1"))) == [("연락은 [이메일]",)]


def test_rows_that_differ_in_private_data_alone_are_duplicates() -> None:
    found = cleaned(talk("내 번호 010-1234-5678", "응"), talk("내 번호 010-9999-0000", "응"))
    assert dict(found.report.dropped) == {"exact_duplicate": 1}
    assert dict(found.report.masked) == {"phone": 1}


def test_many_talks_lie_in_a_file_and_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talks = [talk(long_text(number % 40), f"답 {number % 40}") for number in range(50)]
    expected = clean_talks(talks, Clean(), None)
    monkeypatch.setattr(store, "MEMORY_MB", 0)
    monkeypatch.setattr(clean, "Spool", lambda folder: store.Spool(folder, 0))
    found = clean_talks(iter(talks), Clean(), tmp_path)
    assert found.talks.is_in_file and not expected.talks.is_in_file
    assert list(found.talks) == list(expected.talks)
    assert found.report == expected.report


def test_no_talk_is_no_trouble() -> None:
    found = cleaned()
    assert (found.report.loaded, len(found.talks), found.report.cluster.tolist()) == (0, 0, [])
