"""Where numbers stand on an axis, which of them are written beside it, and many points told by few."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
MOST_POINTS = 240  # of a line: more than a screen can show apart
N_TICKS = 5
WIDE = 12.0  # times: from this ratio up numbers are drawn on a logarithmic axis where that is allowed


@dataclass(frozen=True)
class Axis:
    """From low to high; is_log: powers of ten lie at equal distances; is_whole: nothing lies between 1 and 2."""

    low: float
    high: float
    is_log: bool = False
    is_whole: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one; beyond them too."""
        low, high, value = (math.log(max(one, 1e-300)) if self.is_log else one for one in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """The numbers to write, few and round, within the axis."""
        found = _powers(self.low, self.high) if self.is_log else []
        found = found if len(found) > 1 else _round_ones(self.low, self.high)
        return [tick for tick in found if not self.is_whole or tick == int(tick)]


def axis_of(values: Sequence[float], *, may_be_log: bool = False, whole: bool = False) -> Axis:
    """An axis around finite values with a little room; `whole`: of steps, which take all of it but for their marks."""
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= WIDE:
        return Axis(low / 1.15, high * 1.15, is_log=True)
    room = (0.008 if whole else 0.04) * (high - low) or abs(high) * 0.05 or 1.0
    return Axis(low - room, high + room)


def _powers(low: float, high: float) -> list[float]:
    first, last, wide = math.floor(math.log10(low)), math.ceil(math.log10(high)), math.log10(high / low)
    steps = (1.0, 2.0, 5.0) if wide <= 1.5 else (1.0, 3.0) if wide <= 3 else (1.0,)
    return [
        step * 10.0**power for power in range(first, last + 1) for step in steps if low <= step * 10.0**power <= high
    ]


def _round_ones(low: float, high: float) -> list[float]:
    rough = (high - low) / N_TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 2.5, 5, 10) if unit * times >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """A number beside an axis."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Bundle:
    """Points that lie close together on the x axis: where, their mean, the lowest and the highest."""

    x: float
    mean: float
    low: float
    high: float


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Bundle]:
    """At most so many bundles of points, in the order of x; each point is one where they are few."""
    ordered = sorted(points)
    if len(ordered) <= most:
        return [Bundle(x, y, y, y) for x, y in ordered]
    cuts = [at * len(ordered) // most for at in range(most + 1)]
    parts = [ordered[start:end] for start, end in itertools.pairwise(cuts)]
    return [
        Bundle(
            part[len(part) // 2][0],
            math.fsum(y for _, y in part) / len(part),
            min(y for _, y in part),
            max(y for _, y in part),
        )
        for part in parts
    ]
