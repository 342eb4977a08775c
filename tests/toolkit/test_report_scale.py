"""Axes of a report's charts: round numbers beside them, and many points told by few without losing an extreme."""

import pytest

from toolkit.report.scale import Axis, axis_of, thinned, tick_text


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([4.0, 5.0], ["4", "4.25", "4.5", "4.75", "5"]),
        ([1.0, 50_000.0], ["0", "20,000", "40,000"]),
        ([3.0], ["2.9", "3", "3.1"]),
    ],
)
def test_ticks_are_few_and_round(values: list[float], wanted: list[str]) -> None:
    axis = axis_of(values)
    ticks = axis.ticks()
    assert [tick_text(tick) for tick in ticks] == wanted
    assert all(0 <= axis.at(tick) <= 1 for tick in ticks)


@pytest.mark.parametrize("value", [0.0, -2.0, 1e-12, 1e12])
def test_one_value_alone_lies_inside_its_axis(value: float) -> None:
    assert 0 < axis_of([value]).at(value) < 1


def test_a_wide_range_of_rates_is_logarithmic() -> None:
    axis = axis_of([1e-4, 1e-2], may_be_log=True)
    assert axis.is_log and [tick_text(tick) for tick in axis.ticks()] == ["1e-4", "3e-4", "0.001", "0.003", "0.01"]
    assert axis.at(1e-3) == pytest.approx(0.5)
    assert not axis_of([0.0, 1e-2], may_be_log=True).is_log


def test_many_points_are_told_by_few_with_their_extremes() -> None:
    points = [(float(x), 100.0 if x == 777 else -5.0 if x == 31_000 else 1.0) for x in range(50_000)]
    bundles = thinned(points)
    assert len(bundles) == 240
    assert max(one.high for one in bundles) == 100.0 and min(one.low for one in bundles) == -5.0
    assert [one.x for one in bundles] == sorted(one.x for one in bundles)


def test_few_points_stay_as_they_are() -> None:
    assert [(one.x, one.mean, one.low) for one in thinned([(2.0, 4.0), (1.0, 5.0)])] == [(1, 5, 5), (2, 4, 4)]


def test_between_whole_numbers_nothing_is_written() -> None:
    assert [tick_text(tick) for tick in Axis(0.9, 2.1, is_whole=True).ticks()] == ["1", "2"]
