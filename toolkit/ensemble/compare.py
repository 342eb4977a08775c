"""Does a combination help? Against its best member, on the same held-out talk, conversation by conversation."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from toolkit.evaluate.metrics import bootstrap_difference, bootstrap_interval

Sums = Sequence[tuple[float, float]]
Measure = Literal["loss", "error rate"]
FEWEST = 20  # conversations; an interval over fewer says nothing


@dataclass(frozen=True)
class Verdict:
    """What the comparison came to. best: the member that is best on the very talk that judges, which favours members: a
    combination that helps helps against each of them.

    chosen_here: whether weights were fitted on this talk, since nothing else was held out; nothing is decided then.
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
    chosen_here: bool = False

    @property
    def helps(self) -> bool:
        """Whether the combination is better than its best member beyond chance: the interval lies above 0."""
        return self.low > 0 and self.n >= FEWEST and not self.chosen_here

    @property
    def hurts(self) -> bool:
        """Whether it is worse beyond chance."""
        return self.high < 0 and self.n >= FEWEST

    def sentence(self, combination: str) -> str:
        """The verdict in words."""
        unit = "%" if self.measure == "loss" else "points"
        change, low, high = (0.0 - 100 * of for of in (self.gain, self.high, self.low))
        counted = f"{self.n} held-out conversation{'s' * (self.n != 1)}, one seed"
        said = (
            f"{self.measure} {self.of_combination:.4g} against {self.of_best:.4g} of {self.best}, the best member:"
            f" {change:+.1f} {unit} ({low:+.1f} to {high:+.1f}; {counted})"
        )
        if self.n < FEWEST:
            return f"Whether the {combination} helps cannot be told from so few conversations: {said}."
        if self.chosen_here and not self.hurts:
            return f"The {combination} was fitted on the talk that judges it, so this decides nothing: {said}."
        if self.helps:
            return f"The {combination} helps: {said}."
        if self.hurts:
            return f"The {combination} does not help, {self.best} alone is better: {said}."
        return f"The {combination} does not help beyond chance: {said}."

    def facts(self, combination: str) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "helps": self.helps, "hurts": self.hurts, "sentence": self.sentence(combination)}


def verdict(members: Mapping[str, Sums], sums: Sums, measure: Measure, *, chosen_here: bool = False) -> Verdict:
    """Compare (sum, count) of the same conversations, in the same order, of every member and of the combination.

    The sums are of what is better when lower: nats and tokens for the loss, mistakes and texts for the error rate.
    Raises: ValueError for other conversations. Cost: 1,000 draws.
    """
    best = min(members, key=lambda name: mean(members[name]))
    compared = bootstrap_interval if measure == "loss" else bootstrap_difference
    found = compared(members[best], sums)
    means = (mean(members[best]), mean(sums))
    return Verdict(best, measure, *means, found.value, found.low, found.high, len(sums), chosen_here)


def mean(sums: Sums) -> float:
    """Of what these (sum, count) stand for; 0 where they count nothing."""
    return sum(value for value, _ in sums) / max(1.0, sum(count for _, count in sums))
