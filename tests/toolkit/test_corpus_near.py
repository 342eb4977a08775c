"""Near duplicates: found where they are, and only there."""

import random
from pathlib import Path

import numpy as np
import pytest

from toolkit.corpus import near
from toolkit.corpus.near import find_near
from toolkit.corpus.talk import Talk, Turn

SYLLABLES = "가나다라마바사아자차하고노도로모보소오조기니디리미비시이지은는을를에서와과"
LETTERS = "etaoinshrdlucmfwypvbgk"


def sentence(rng: random.Random, signs: str = SYLLABLES, n_words: int = 20) -> str:
    return " ".join("".join(rng.choices(signs, k=rng.randint(2, 5))) for _ in range(n_words))


def talk(asked: str, answer: str = "", system: str = "") -> Talk:
    turns = (("system", system), ("user", asked), ("assistant", answer))
    return Talk(tuple(Turn(role, content) for role, content in turns if content), "a:1")  # type: ignore[arg-type]


def jaccard(a: str, b: str, n: int) -> float:
    first, second = ({text[at : at + n] for at in range(len(text) - n + 1)} for text in (a, b))
    return len(first & second) / len(first | second)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(20261124)


@pytest.mark.parametrize("signs", [SYLLABLES, LETTERS])
def test_planted_near_duplicates_are_found_and_nothing_else(rng: random.Random, signs: str) -> None:
    originals = [sentence(rng, signs, n_words=80) for _ in range(300)]
    copies = [text[:40] + rng.choice("ㅋ!~") + text[41:] for text in originals[:60]]
    assert min(jaccard(text, originals[place], 5) for place, text in enumerate(copies)) > 0.95
    found = find_near([talk(text) for text in originals + copies], 0.7, 0.9, None)
    assert found.strict.tolist() == [*range(300), *range(60)]
    assert found.loose.tolist() == [*range(300), *range(60)]


def test_the_first_of_a_cluster_stands_for_it(rng: random.Random) -> None:
    text, other = sentence(rng), sentence(rng)
    talks = [talk(other), talk(text + "요"), talk(text), talk(text + "ㅋ")]
    assert find_near(talks, 0.7, 0.9, None).strict.tolist() == [0, 1, 1, 1]


def test_looser_talks_cluster_loosely_alone(rng: random.Random) -> None:
    text = sentence(rng, n_words=40)
    other = text[: int(len(text) * 0.9)] + sentence(rng, n_words=4)
    assert 0.75 < jaccard(text, other, 3) < 0.85
    found = find_near([talk(text), talk(other)], 0.7, 0.9, None)
    assert (found.loose.tolist(), found.strict.tolist()) == ([0, 0], [0, 1])


def test_without_a_threshold_nothing_is_strictly_alike(rng: random.Random) -> None:
    text = sentence(rng)
    found = find_near([talk(text), talk(text)], 0.7, None, None)
    assert (found.loose.tolist(), found.strict.tolist()) == ([0, 0], [0, 1])


def test_short_texts_cluster_only_when_equal_and_only_loosely() -> None:
    found = find_near(
        [talk("오늘 뭐 먹지?", "칼국수"), talk("오늘 뭐 먹지", "칼국수"), talk("오늘 뭐 먹지?", "칼국수")],
        0.7,
        0.9,
        None,
    )
    assert (found.loose.tolist(), found.strict.tolist()) == ([0, 1, 0], [0, 1, 2])


def test_system_turns_letter_case_and_spaces_are_not_compared(rng: random.Random) -> None:
    text = sentence(rng, LETTERS)
    found = find_near([talk(text, "yes", sentence(rng, LETTERS)), talk(text.upper() + "\n\n", "Yes")], 0.7, 0.9, None)
    assert found.strict.tolist() == [0, 0]


@pytest.mark.parametrize("signs", [SYLLABLES, LETTERS])
def test_a_template_around_short_texts_does_not_make_them_alike(rng: random.Random, signs: str) -> None:
    opening = sentence(rng, n_words=60)
    talks = [talk(f"{opening} 문장: {sentence(rng, signs, n_words=4)}\n감정:", "긍정") for _ in range(300)]
    assert jaccard(talks[0].turns[0].content, talks[1].turns[0].content, 3) > 0.7
    found = find_near([*talks, talks[7]], 0.7, 0.9, None)
    assert found.strict.tolist() == [*range(300), 7]
    assert found.loose.tolist() == [*range(300), 7]


def test_estimates_are_near_the_true_similarity(rng: random.Random) -> None:
    text = sentence(rng, n_words=60)
    for share in (0.3, 0.6, 0.9):
        other = text[: int(len(text) * share)] + sentence(rng, n_words=60)[: int(len(text) * (1 - share))]
        signs, _, _ = near._sign_all([talk(text), talk(other)], None)
        estimate = near._estimate(signs, np.array([0]), np.array([1]))[0]
        assert (
            abs(estimate - jaccard(text.lower(), other.lower(), 3)) < 0.13
        )  # three standard errors of 128 permutations


def test_two_talks_at_the_threshold_nearly_always_meet_in_a_band() -> None:
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        width = near._band_width(threshold)
        assert 1 - (1 - threshold**width) ** (near.N_PERMUTATIONS // width) >= near.CERTAINTY
    assert near._band_width(0.7) > 3  # or nearly every pair would be compared


def test_signatures_in_a_file_give_the_same_clusters(
    rng: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [sentence(rng) for _ in range(50)]
    talks = [talk(text) for text in [*texts, *(text + "요" for text in texts[:10])]]
    expected = find_near(talks, 0.7, 0.9, None)
    monkeypatch.setattr(near, "MEMORY_BYTES", 0)
    monkeypatch.setattr(near, "BATCH_CHARS", 500)
    found = find_near(talks, 0.7, 0.9, tmp_path)
    assert (found.loose.tolist(), found.strict.tolist()) == (expected.loose.tolist(), expected.strict.tolist())
    assert expected.strict.tolist()[50:] == list(range(10))
    assert list(tmp_path.iterdir()) == []


def test_a_text_longer_than_one_piece_is_signed_whole(rng: random.Random) -> None:
    text = sentence(rng, n_words=6000)
    assert len(text) > near.PIECE
    other = text[: near.PIECE] + sentence(rng, n_words=3000)
    found = find_near([talk(text), talk(other), talk(text + "끝")], 0.7, 0.9, None)
    assert (found.strict.tolist(), found.loose.tolist()) == ([0, 1, 0], [0, 1, 0])


def test_a_gram_is_three_signs_of_hangul_and_five_of_latin() -> None:
    assert [len(grams) for grams in near._grams(["가나다라마바", "abcdef", "가", "", "abc 가나다"])] == [4, 2, 0, 0, 5]
    first, second, third = near._grams(["가나다", "나가나다", "가나다"])
    assert first == third == second[1] != second[0]


def test_two_pairs_that_meet_in_one_bucket_are_told_apart(rng: random.Random) -> None:
    texts = [sentence(rng, n_words=40) for _ in range(2)]
    talks = [talk(text + end) for end in ("", "요", "ㅋ") for text in texts]
    signs, _, _ = near._sign_all(talks, None)
    forests = near._Forest(6), near._Forest(6)
    near._match_buckets(np.zeros(6, dtype=np.uint64), np.arange(6), signs, (0.7, 0.9), forests)
    assert [forest.roots.tolist() for forest in forests] == [[0, 1, 0, 1, 0, 1]] * 2


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MEMORY_BYTES", 0)
    with pytest.raises(FileNotFoundError):
        find_near([talk("안녕")], 0.7, 0.9, tmp_path / "missing")


def test_nothing_and_empty_texts_are_no_trouble() -> None:
    assert find_near([], 0.7, 0.9, None).strict.tolist() == []
    assert find_near([talk("?"), Talk((), "a:2")], 0.7, 0.9, None).strict.tolist() == [0, 1]
