"""Does a combination help? Against its best member, on the same held-out talk, conversation by conversation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from toolkit.evaluate.metrics import bootstrap_difference, bootstrap_interval

Sums = Sequence[tuple[float, float]]
Measure = Literal["loss", "error rate"]


@dataclass(frozen=True)
class Verdict:
    """What the comparison came to.

    gain: how far the combination lies below its best member, as a share of the loss or in points of the error rate,
    with its 95 % interval over conversations.
    """

    best: str
    measure: Measure
    of_best: float
    of_combination: float
    gain: float
    low: float
    high: float
    n: int

    @property
    def helps(self) -> bool:
        """Whether the combination is better than its best member beyond chance: the interval lies above 0."""
        return self.low > 0

    @property
    def hurts(self) -> bool:
        """Whether it is worse beyond chance."""
        return self.high < 0

    def sentence(self, combination: str) -> str:
        """The verdict in words."""
        unit = "%" if self.measure == "loss" else "points"
        said = (
            f"{self.measure} {self.of_combination:.4g} against {self.of_best:.4g} of {self.best}, the best member:"
            f" {-100 * self.gain:+.1f} {unit} ({-100 * self.high:+.1f} to {-100 * self.low:+.1f}; {self.n} held-out"
            " conversations, one seed)"
        )
        if self.helps:
            return f"The {combination} helps: {said}."
        if self.hurts:
            return f"The {combination} does not help, {self.best} alone is better: {said}."
        return f"The {combination} does not help beyond chance: {said}."

    def facts(self, combination: str) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "helps": self.helps, "hurts": self.hurts, "sentence": self.sentence(combination)}


def verdict(best: str, best_sums: Sums, sums: Sums, measure: Measure) -> Verdict:
    """Compare (sum, count) of the same conversations, in the same order, of the best member and of the combination.

    The sums are of what is better when lower: nats and tokens for the loss, mistakes and texts for the error rate.
    Raises: ValueError for other conversations. Cost: 1,000 draws.
    """
    compared = bootstrap_interval if measure == "loss" else bootstrap_difference
    interval = compared(best_sums, sums)
    return Verdict(best, measure, _mean(best_sums), _mean(sums), interval.value, interval.low, interval.high, len(sums))


def _mean(sums: Sums) -> float:
    return sum(value for value, _ in sums) / max(1.0, sum(count for _, count in sums))
