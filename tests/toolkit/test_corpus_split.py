"""Splits: whole clusters, the same every time, each language and label in its share, no part empty."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.corpus.clean import clean_talks
from toolkit.corpus.near import Ints
from toolkit.corpus.split import draw, split_talks
from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import DataError
from toolkit.recipe.model import Clean


def talks(n_talks: int, langs: tuple[str, ...] = ("ko",), labels: tuple[str | None, ...] = (None,)) -> list[Talk]:
    return [
        Talk(
            (Turn("user", f"{number}번"), Turn("assistant", "응")),
            f"a:{number}",
            labels[number % len(labels)],
            langs[number % len(langs)],
        )
        for number in range(n_talks)
    ]


def alone(n_talks: int) -> Ints:
    return np.arange(n_talks)


def test_every_talk_is_in_one_part_and_in_order() -> None:
    split = split_talks(clean_talks(talks(100), Clean(), None), 0.1, 0.2, seed=0)
    assert (len(split.train), len(split.valid), len(split.test)) == (70, 10, 20)
    for part in (split.train, split.valid, split.test):
        numbers = [int(talk.source[2:]) for talk in part]
        assert numbers == sorted(numbers)
    assert {talk.source for part in (split.train, split.valid, split.test) for talk in part} == {
        f"a:{n}" for n in range(100)
    }


def test_the_seed_decides_and_nothing_else() -> None:
    first, again, other = (draw(talks(200), alone(200), (0.1, 0.1), seed).tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_the_seed_gives_this_split_on_every_machine() -> None:
    assert np.flatnonzero(draw(talks(20), alone(20), (0.1, 0.1), 0) == 1).tolist() == [8, 19]


def test_a_cluster_is_never_torn_apart() -> None:
    cluster = np.repeat(np.arange(60), 3)
    part = draw(talks(180), cluster, (0.2, 0.2), 3)
    assert all(len(set(part[cluster == number].tolist())) == 1 for number in range(60))
    assert np.bincount(part).tolist() == [108, 36, 36]


def test_a_cluster_too_large_for_a_share_stays_in_train() -> None:
    cluster = np.concatenate([np.zeros(50, dtype=int), np.arange(1, 51)])
    for seed in range(10):
        part = draw(talks(100), cluster, (0.1, 0.1), seed)
        assert set(part[:50].tolist()) == {0}
        assert np.bincount(part).tolist() == [80, 10, 10]


def test_each_language_gives_its_share() -> None:
    many = talks(200, langs=("ko", "ko", "ko", "en"))
    part = draw(many, alone(200), (0.1, 0.1), 0)
    for number in (1, 2):
        langs = [many[place].lang for place in np.flatnonzero(part == number)]
        assert (langs.count("ko"), langs.count("en")) == (15, 5)


def test_each_label_gives_its_share_inside_its_language() -> None:
    many = talks(200, labels=("긍정", "긍정", "긍정", "부정"))
    labels = [many[place].label for place in np.flatnonzero(draw(many, alone(200), (0.2, 0.0), 0) == 1)]
    assert (labels.count("긍정"), labels.count("부정")) == (30, 10)


def test_many_rare_labels_still_fill_the_share() -> None:
    many = talks(100, labels=tuple(f"의도 {number}" for number in range(50)))
    assert np.bincount(draw(many, alone(100), (0.1, 0.1), 0)).tolist() == [80, 10, 10]


@pytest.mark.parametrize("n_talks", [3, 4, 5, 9])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_three_talks_are_enough_for_three_parts(n_talks: int, share: float) -> None:
    assert (np.bincount(draw(talks(n_talks), alone(n_talks), (share, share), 0), minlength=3) > 0).all()


def test_a_share_of_nothing_holds_nothing_out() -> None:
    assert draw(talks(5), alone(5), (0.0, 0.0), 0).tolist() == [0] * 5
    assert draw(talks(1), alone(1), (0.0, 0.0), 0).tolist() == [0]


def test_one_talk_cannot_be_split() -> None:
    with pytest.raises(
        DataError, match=r"1 conversation: too little .*\(3 are needed\).*data\.valid: 0 and data\.test: 0"
    ):
        draw(talks(1), alone(1), (0.1, 0.1), 0)


def test_talks_all_alike_cannot_be_split() -> None:
    with pytest.raises(DataError, match="50 conversations, so much alike that they are 1 for a split"):
        draw(talks(50), np.zeros(50, dtype=int), (0.1, 0.0), 0)


def test_no_talk_cannot_be_split() -> None:
    with pytest.raises(DataError, match="no conversation is left"):
        draw([], alone(0), (0.1, 0.1), 0)


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["ko", "en"])), min_size=3, max_size=40),
    st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5]),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_whatever_the_clusters_parts_are_whole_and_not_empty(
    rows: list[tuple[int, str]], valid: float, test: float
) -> None:
    cluster = np.array([number for number, _ in rows])
    many = [
        Talk((Turn("user", "?"), Turn("assistant", "!")), f"a:{place}", None, lang)
        for place, (_, lang) in enumerate(rows)
    ]
    wanted = {0, *([1] if valid else []), *([2] if test else [])}
    if len(set(cluster.tolist())) < len(wanted):
        with pytest.raises(DataError):
            draw(many, cluster, (valid, test), 0)
        return
    part = draw(many, cluster, (valid, test), 0)
    assert set(part.tolist()) == wanted
    assert all(len(set(part[cluster == number].tolist())) == 1 for number in set(cluster.tolist()))
