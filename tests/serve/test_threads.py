"""What of a step wakes all threads is what made it fastest, and nothing else changes."""

from typing import Any

import pytest
import torch

from serve.engines import threads
from serve.engines.slots import Slots
from serve.engines.threads import Team, Wakes, for_rows, quickest
from tests.stacked_world import make_base
from toolkit.stack.stack import Stack


class Clock:
    """Steps take as long as is said, by this clock."""

    def __init__(self, seconds: dict[Wakes, float]) -> None:
        self.now, self.seconds, self.taken = 0.0, seconds, list[Wakes]()

    def step(self, wakes: Wakes) -> None:
        self.now += self.seconds[wakes]
        self.taken.append(wakes)


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ((0.010, 0.020, 0.030, 0.040), Wakes.NOTHING),
        ((0.020, 0.010, 0.011, 0.040), Wakes.HEAD),
        ((0.040, 0.030, 0.010, 0.020), Wakes.PRODUCTS),
        ((0.040, 0.030, 0.020, 0.010), Wakes.EVERYTHING),
        ((0.0102, 0.0101, 0.0101, 0.0100), Wakes.NOTHING),  # as good as the same: fewer threads
    ],
)
def test_the_quickest_is_found(monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], found: Wakes) -> None:
    clock = Clock(dict(zip(Wakes, seconds, strict=True)))
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock.now)
    assert quickest(clock.step) is found
    assert {wakes: clock.taken[1:].count(wakes) for wakes in Wakes} == dict.fromkeys(Wakes, threads.TRIES)


def test_long_steps_are_not_tried_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(dict.fromkeys(Wakes, 1.0))
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock.now)
    assert quickest(clock.step) is Wakes.PRODUCTS and len(clock.taken) == 2


def test_rows_between_are_as_the_next_that_was_tried() -> None:
    tried = {1: Wakes.NOTHING, 8: Wakes.HEAD, 32: Wakes.PRODUCTS}
    assert [for_rows(tried, n_rows) for n_rows in (1, 2, 8, 9, 32, 64)] == [
        Wakes.NOTHING, Wakes.HEAD, Wakes.HEAD, Wakes.PRODUCTS, Wakes.PRODUCTS, Wakes.PRODUCTS
    ]  # fmt: skip
    assert for_rows({}, 8) is Wakes.EVERYTHING


def test_one_thread_and_all_of_them(several_threads: None) -> None:
    team = Team()
    with team.one():
        assert torch.get_num_threads() == 1
        with team.all():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_slots_are_empty_after_they_were_tuned(several_threads: None) -> None:
    slots: Any = Slots(Stack(make_base()))
    assert slots.forward_name == "lean"
    slots.tune()
    assert set(slots._forward.tried) == {1, 8, 32} and len(slots) == 0 and slots.cache.n_bytes == 0
    assert torch.get_num_threads() == 2


def test_on_one_thread_nothing_is_tried() -> None:
    slots: Any = Slots(Stack(make_base()))
    slots._forward.team.size = 1
    slots.tune()
    with slots.few_threads():
        assert slots._forward.tried == {}
