"""Which candidate is best, and how sure that is: pure numbers over what was measured conversation by conversation."""

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.choose.result import Result
from toolkit.evaluate.metrics import Interval, bootstrap_difference

LEAST_TALKS = 2  # fewer tell nothing about others: no interval
KEPT_SHARE, MOST_SHARE, LEAST_KEPT = 0.25, 0.5, 2  # of those that were tried briefly, who is tried again
MANY = 6  # more candidates than this are halved
BRIEF = 0.25  # of the time is given to each of many, at first


@dataclass(frozen=True)
class Place:
    """One candidate's place: its measure and that of the bare base over the conversations that all saw whole.

    interval: of the measure; behind: by how much it is above the best one's, with the interval of the difference,
    conversation by conversation. Both None where there are too few conversations, behind also for the best itself.
    is_tied: its difference to the best one may be chance.
    """

    result: Result
    value: float
    before: float
    interval: Interval | None
    behind: Interval | None
    is_tied: bool

    @property
    def gain_per_minute(self) -> float:
        """By how much the measure fell in a minute of learning."""
        return (self.before - self.value) / (self.result.seconds / 60) if self.result.seconds else 0.0


@dataclass(frozen=True)
class Ranking:
    """Places from the best on; those that cannot be compared, with the reason; how many conversations were."""

    places: tuple[Place, ...]
    apart: tuple[tuple[Result, str], ...]
    n_talks: int

    @property
    def winner(self) -> Place | None:
        """The best, where no other may be as good."""
        return self.places[0] if self.places and not any(place.is_tied for place in self.places[1:]) else None

    @property
    def leaders(self) -> tuple[Place, ...]:
        """The best and those that may be as good."""
        return tuple(place for number, place in enumerate(self.places) if number == 0 or place.is_tied)


def rank(results: Sequence[Result]) -> Ranking:
    """Order candidates by the mean of their measure over the conversations that all of them saw whole."""
    apart = [(one, why) for one in results if (why := _incomparable(one))]
    found = [one for one in results if not _incomparable(one)]
    shared = _shared(found)
    while found and not shared:  # one whose context is much shorter than the others' shares nothing with them
        poorest = min(found, key=lambda one: len(one.talks))
        found.remove(poorest)
        apart.append((poorest, "no held-out conversation that the others saw fits whole into its context"))
        shared = _shared(found)
    ordered = sorted(found, key=lambda one: mean(_sums(one, shared)))
    places = tuple(_place(one, ordered[0], shared) for one in ordered) if ordered else ()
    return Ranking(places, tuple(apart), len(shared))


def mean(sums: Sequence[tuple[float, float]]) -> float:
    """The sum of sums over the sum of counts."""
    return sum(value for value, _ in sums) / max(1e-9, sum(count for _, count in sums))


def difference(one: Result, other: Result) -> Interval | None:
    """By how much `one` is above `other`, over the conversations both saw whole; None where they are too few."""
    shared = _shared([one, other])
    if len(shared) < LEAST_TALKS:
        return None
    return bootstrap_difference(_sums(one, shared), _sums(other, shared))


def survivors(ranking: Ranking) -> list[Result]:
    """Who of many is tried for the whole time: the best quarter, two at least, and of those that may be as good as the
    best as many as make half.
    """
    n = len(ranking.places)
    sure = max(LEAST_KEPT, round(KEPT_SHARE * n))
    most = max(sure, round(MOST_SHARE * n))
    return [place.result for i, place in enumerate(ranking.places) if i < sure or (i < most and place.is_tied)]


def rungs(n_candidates: int, minutes: float) -> tuple[float, ...]:
    """The minutes of each round: one round, or for many candidates a brief one before it."""
    return (minutes,) if n_candidates <= MANY else (minutes * BRIEF, minutes)


def _incomparable(one: Result) -> str:
    if one.n_unknown:
        return (
            f"its tokenizer has no token for {one.n_unknown:,} pieces of the held-out text, so its bits per byte would"
            " be too low to compare"
        )
    return "" if one.talks else "no held-out conversation fits whole into its context"


def _shared(results: Sequence[Result]) -> list[str]:
    if not results:
        return []
    common = set.intersection(*(set(one.talks) for one in results))
    return sorted(common, key=int)


def _sums(one: Result, shared: Sequence[str]) -> list[tuple[float, float]]:
    return [(one.talks[name][0], one.talks[name][2]) for name in shared]


def _place(one: Result, best: Result, shared: Sequence[str]) -> Place:
    own = _sums(one, shared)
    before = mean([(one.talks[name][1], one.talks[name][2]) for name in shared])
    if len(shared) < LEAST_TALKS:
        return Place(one, mean(own), before, None, None, is_tied=one is not best)
    interval = bootstrap_difference(own, [(0.0, count) for _, count in own])
    behind = None if one is best else bootstrap_difference(own, _sums(best, shared))
    return Place(one, mean(own), before, interval, behind, is_tied=behind is not None and behind.low <= 0)
