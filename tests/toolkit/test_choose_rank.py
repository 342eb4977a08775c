"""Who is best, and whether that may be chance."""

import pytest

from tests.choosing_world import some_result
from toolkit.choose.rank import MANY, difference, rank, rungs, survivors


def test_the_lowest_measure_comes_first_and_wins_where_every_talk_agrees() -> None:
    ranking = rank([some_result("가", 2.0), some_result("나", 1.8), some_result("다", 2.4)])
    assert [place.result.model for place in ranking.places] == ["나", "가", "다"]
    assert ranking.winner is not None and ranking.winner.result.model == "나"
    behind = ranking.places[1].behind
    assert behind is not None and behind.low > 0 and behind.value == pytest.approx(0.2)


def test_differences_are_paired_so_that_hard_talks_hide_nothing() -> None:
    ranking = rank([some_result("가", 2.00, noise=1.0), some_result("나", 1.98, noise=1.0)])
    first, second = ranking.places
    assert first.interval is not None and second.interval is not None
    assert first.interval.high > second.interval.low  # seen alone they overlap
    assert ranking.winner is not None


def test_there_is_no_clear_winner_where_talks_disagree() -> None:
    ranking = rank([some_result("가", 2.00, own=0.5), some_result("나", 1.98, own=0.5), some_result("다", 4.0)])
    assert ranking.winner is None
    assert {place.result.model for place in ranking.leaders} == {"가", "나"}


def test_one_conversation_gives_an_order_and_no_interval() -> None:
    ranking = rank([some_result("가", 2.0, n_talks=1), some_result("나", 1.0, n_talks=1)])
    assert [place.result.model for place in ranking.places] == ["나", "가"]
    assert ranking.winner is None and ranking.places[1].is_tied
    assert all(place.interval is None and place.behind is None for place in ranking.places)


def test_only_conversations_that_all_saw_whole_are_compared() -> None:
    short = some_result("짧은", 2.0)
    seen = {name: of for name, of in short.talks.items() if int(name) < 10}
    ranking = rank([some_result("긴", 2.1), some_result("짧은", 2.0, talks=seen)])
    assert ranking.n_talks == 10


def test_a_base_that_shares_no_conversation_stands_apart_and_the_others_are_compared() -> None:
    lonely = some_result("짧은", 1.0, talks={"77": (100.0, 300.0, 100.0)})
    ranking = rank([some_result("가", 2.0), lonely, some_result("나", 2.5)])
    assert [place.result.model for place in ranking.places] == ["가", "나"]
    assert [one.model for one, _ in ranking.apart] == ["짧은"]


def test_a_tokenizer_that_cannot_write_the_text_wins_nothing_by_it() -> None:
    ranking = rank([some_result("가", 2.0), some_result("영어만", 0.5, n_unknown=900)])
    assert [place.result.model for place in ranking.places] == ["가"]
    assert "900 pieces" in ranking.apart[0][1]


def test_nobody_to_rank_is_no_error() -> None:
    assert rank([]).places == () and rank([]).winner is None


def test_gain_per_minute_is_what_a_minute_of_learning_lowered() -> None:
    place = rank([some_result("가", 2.0, noise=0.0, seconds=120.0)]).places[0]
    assert place.before == pytest.approx(3.0) and place.gain_per_minute == pytest.approx(0.5)


def test_many_candidates_are_tried_briefly_first() -> None:
    assert rungs(MANY, 4.0) == (4.0,)
    assert rungs(MANY + 1, 4.0) == (1.0, 4.0)


def test_the_best_quarter_goes_on_and_who_may_be_as_good() -> None:
    clear = rank([some_result(f"m{i}", 1.0 + 0.1 * i) for i in range(12)])
    assert [one.model for one in survivors(clear)] == ["m0", "m1", "m2"]
    close = rank([some_result(f"m{i}", 1.0 + 0.001 * i, own=0.5) for i in range(12)])
    assert 3 < len(survivors(close)) <= 6


def test_any_two_can_be_compared() -> None:
    found = difference(some_result("가", 2.0), some_result("나", 1.5))
    assert found is not None and found.value == pytest.approx(0.5)
    assert difference(some_result("가", 2.0, n_talks=1), some_result("나", 1.5, n_talks=1)) is None
