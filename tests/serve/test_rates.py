"""How often one owner may ask."""

import pytest

from serve.rates import Rates, wrong_rate
from serve.refusal import Refusal


def test_the_request_too_many_is_told_when_to_come_again() -> None:
    rates = Rates("3/hour")
    for _ in range(3):
        rates.take("kim")
    with pytest.raises(Refusal, match="3 in a hour for kim") as raised:
        rates.take("kim")
    assert raised.value.status == 429 and 1 <= int(raised.value.headers["retry-after"]) <= 3600
    rates.take("lee")


def test_an_owners_own_rate_wins() -> None:
    rates = Rates("1/hour")
    for _ in range(5):
        rates.take("kim", "5/hour")
    with pytest.raises(Refusal):
        rates.take("kim", "5/hour")


def test_without_a_rate_nothing_is_counted() -> None:
    for _ in range(1000):
        Rates().take("kim")


def test_work_can_count_more_than_once() -> None:
    rates = Rates("10/hour")
    rates.take("kim", cost=8)
    with pytest.raises(Refusal):
        rates.take("kim", cost=3)


@pytest.mark.parametrize(
    "rate", ["", "60", "0/minute", "60/fortnight", "-1/minute", "60 / minute", "60/minute;5/second"]
)
def test_a_rate_that_does_not_read_is_told(rate: str) -> None:
    assert "is no rate" in (wrong_rate(rate) or "")


def test_rates_that_read() -> None:
    assert not any(map(wrong_rate, ("5/second", "60/minute", "1000/hour", "999999999/day")))
