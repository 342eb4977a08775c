"""On how many threads the parts of a step run.

A step that writes a token a row is made of hundreds of small parts. Waking other threads costs each of them tens of
microseconds, more than most of them take, and threads that wait for the next part take from the one that works. So what
of a step wakes them is tried when a server starts, on whole steps. Products of packed weights have the same bits on any
number of threads.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum

import torch

TRIED_ROWS = (1, 8, 32)
TRIES = 3
CLOSE = 1.03  # of the shortest time: then fewer threads are better
LONG_S = 0.25  # a step that takes longer is not tried any further


class Wakes(IntEnum):
    """What of a step runs on all threads."""

    NOTHING = 0
    HEAD = 1
    PRODUCTS = 2
    EVERYTHING = 3


class Team:
    """The threads that torch has where this is made."""

    def __init__(self) -> None:
        self.size = torch.get_num_threads()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Inside, everything runs on one thread."""
        with _threads(1):
            yield

    @contextmanager
    def all(self) -> Iterator[None]:
        """Inside, everything runs on all of them."""
        with _threads(self.size):
            yield


def quickest(step: Callable[[Wakes], object]) -> Wakes:
    """What should wake the threads in this step. It is run up to 13 times."""
    step(Wakes.EVERYTHING)
    taken: dict[Wakes, list[float]] = {wakes: [] for wakes in Wakes}
    for _ in range(TRIES):
        for wakes, seconds in taken.items():
            started = time.perf_counter()
            step(wakes)
            seconds.append(time.perf_counter() - started)
            if seconds[-1] > LONG_S:
                return Wakes.PRODUCTS
    medians = {wakes: statistics.median(seconds) for wakes, seconds in taken.items()}
    return next(wakes for wakes, seconds in medians.items() if seconds <= CLOSE * min(medians.values()))


def for_rows(tried: Mapping[int, Wakes], n_rows: int) -> Wakes:
    """What was found for the next larger number of rows; for more rows than any, as for the most."""
    if not tried:
        return Wakes.EVERYTHING
    return tried[min((tested for tested in tried if tested >= n_rows), default=max(tried))]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
