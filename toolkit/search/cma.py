"""CMA-ES without anything kept: where it stands is worked out anew from the trials that have ended.

Optuna's own CmaEsSampler pickles its optimizer into the storage and unpickles what it finds there, so that whoever may
write to a database, or hands over a run folder, runs code here. This one writes nothing and reads numbers only.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cmaes  # type: ignore[import-untyped]
import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from toolkit.recipe.model import Recipe
from toolkit.recipe.search import Dimension, Range, dimensions, value_of
from toolkit.search import ledger
from toolkit.search.space import is_whole

Point = tuple[float, ...]  # a trial's values, each between 0 and 1
Generation = tuple[Point, ...]  # the best first
SPREAD = 0.25  # the first standard deviation, as a part of a range
INSET = 0.2  # how far inside the first middle is: around a corner most of what is drawn would lie outside
DRAWS, NARROW, WIDER = 40, 8, 1.25  # tries for a new point, how many are drawn as they are, by how much more others are
KEPT_GENERATIONS = 1024  # about 10 KB each


@dataclass(frozen=True)
class Axis:
    """A range as the optimizer sees it: from 0 to 1, even in the logarithm where it is logarithmic.

    A value on a step stands for the half step on both sides of it, so the first and the last are as likely as others.
    """

    name: str
    key: str
    distribution: FloatDistribution | IntDistribution

    def to_unit(self, value: float) -> float:
        """Where a value of the range lies between 0 and 1."""
        low, high = self._ends()
        scaled = math.log(value) if self.distribution.log else float(value)
        return min(max((scaled - low) / (high - low), 0.0), 1.0)

    def from_unit(self, unit: float) -> int | float:
        """The value of the range at a place between 0 and 1."""
        low, high = self._ends()
        scaled = low + unit * (high - low)
        value, one = math.exp(scaled) if self.distribution.log else scaled, self.distribution
        if one.step is not None:
            value = one.low + math.floor((value - one.low) / one.step + 0.5) * one.step
        if isinstance(one, IntDistribution):
            return min(max(int(value), one.low), one.high)
        if one.step is not None:
            value = float(f"{value:.12g}")  # 0.3, not 0.30000000000000004
        return min(max(value, one.low), one.high)

    def holds(self, value: object) -> bool:
        """Whether it is a number of the range; steps do not matter."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.distribution.low <= value <= self.distribution.high  # type: ignore[operator]

    def _ends(self) -> tuple[float, float]:
        margin = (self.distribution.step or 0) / 2
        low, high = self.distribution.low - margin, self.distribution.high + margin
        return (math.log(low), math.log(high)) if self.distribution.log else (low, high)


def axes(recipe: Recipe) -> tuple[Axis, ...]:
    """The recipe's ranges that hold more than one value."""
    numbers = [Axis(one.name, one.key, _distribution(one.values)) for one in dimensions(recipe) if _is_range(one)]
    return tuple(axis for axis in numbers if not axis.distribution.single())


def _is_range(dimension: Dimension) -> bool:
    return dimension.when is None and isinstance(dimension.values, Range)


def _distribution(values: Any) -> FloatDistribution | IntDistribution:
    if is_whole(values):
        return IntDistribution(int(values.low), int(values.high), values.log, int(values.step or 1))
    return FloatDistribution(float(values.low), float(values.high), values.log, values.step)


class ReplayedCmaEs(BaseSampler):
    """Proposes by CMA-ES; the trials that have ended, by number, make up its generations, `seed` the draw from them.

    So every worker that sees the same trials stands at the same place, after a restart too. A trial that ends late,
    proposed when there was less to know, has its place among its neighbours like any other. Nothing that was tried is
    proposed again while the space has other points near. The first generation is drawn around the recipe's own values.
    `counts_pruned`: whether the last loss of a pruned trial compares with other trials' losses; else it ranks behind
    them, and the longer it was trained the better. A trial that failed by itself ranks last; one that was lost, or that
    another was quicker to take, does not count. Source: The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772.
    """

    def __init__(self, recipe: Recipe, *, seed: int, counts_pruned: bool) -> None:
        self._recipe, self._axes = recipe, axes(recipe)
        self._seed, self._counts_pruned = seed, counts_pruned
        self._at_random = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All ranges of the recipe, from the first trial on."""
        return {axis.name: axis.distribution for axis in self._axes}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values for all ranges, from what the trials of the study have shown until now."""
        if not self._axes:
            return {}
        trials = sorted(study.get_trials(deepcopy=False), key=lambda one: one.number)
        optimizer = replayed(self._start(trials), self._ranked(trials))
        taken = {self._place(self._values(one)) for one in trials if one.number != trial.number}
        return self._draw(optimizer, taken)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value at random, for what is no range of the recipe."""
        return self._at_random.sample_independent(study, trial, param_name, param_distribution)

    def _start(self, trials: Sequence[FrozenTrial]) -> Point:
        """The recipe's own values that lie in the space, `auto` as the first trial resolved it; else the middle."""
        begun = (ledger.given(one) for one in trials if one.user_attrs.get(ledger.OWN) and not ledger.is_void(one))
        resolved: Mapping[str, Any] = next((values for values in begun if values), {})
        own = (resolved.get(axis.name, value_of(self._recipe, axis.key)) for axis in self._axes)
        units = (axis.to_unit(v) if axis.holds(v) else 0.5 for axis, v in zip(self._axes, own, strict=True))
        return tuple(min(max(unit, INSET), 1 - INSET) for unit in units)

    def _ranked(self, trials: Sequence[FrozenTrial]) -> list[tuple[tuple[int, float, float], Point]]:
        """The points that count, in the order of their numbers, and what to sort each by."""
        ended = (one for one in trials if one.state.is_finished() and not (ledger.is_void(one) or ledger.is_lost(one)))
        return [(self._rank(one), point) for one in ended if (point := self._point(one)) is not None]

    def _rank(self, trial: FrozenTrial) -> tuple[int, float, float]:
        if trial.state == TrialState.COMPLETE and trial.value is not None and math.isfinite(trial.value):
            return 0, trial.value, 0.0
        step = trial.last_step
        if trial.state == TrialState.PRUNED and step is not None:
            loss = trial.intermediate_values[step]
            if math.isfinite(loss):
                return (0, loss, 0.0) if self._counts_pruned else (1, -step, loss)
        return 2, 0.0, 0.0

    def _point(self, trial: FrozenTrial) -> Point | None:
        """None for a trial of another space, or that ended before it had all of its values."""
        if any(
            trial.distributions.get(axis.name) != axis.distribution or not axis.holds(trial.params[axis.name])
            for axis in self._axes
        ):
            return None
        return tuple(axis.to_unit(trial.params[axis.name]) for axis in self._axes)

    def _values(self, trial: FrozenTrial) -> Mapping[str, Any]:
        return ledger.given(trial) or trial.params

    def _place(self, values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        return ledger.point({axis.name: values[axis.name] for axis in self._axes if axis.name in values})

    def _draw(self, optimizer: Any, taken: set[tuple[tuple[str, str], ...]]) -> dict[str, Any]:
        """Values that no trial has: ever further from the middle, at last anywhere. A space that is used up repeats."""
        optimizer, anywhere = copy.deepcopy(optimizer), np.random.RandomState(self._seed)
        optimizer.reseed_rng(self._seed)
        values: dict[str, Any] = {}
        for i in range(2 * DRAWS):
            if i < DRAWS:
                stretch = WIDER ** max(0, i - NARROW)
                units = np.clip(optimizer.mean + stretch * (optimizer.ask() - optimizer.mean), 0, 1)
            else:
                units = anywhere.uniform(size=len(self._axes))
            values = {axis.name: axis.from_unit(float(x)) for axis, x in zip(self._axes, units, strict=True)}
            if self._place(values) not in taken:
                break
        return values


def replayed(start: Point, ranked: Sequence[tuple[tuple[int, float, float], Point]]) -> Any:
    """The optimizer, begun at `start` and told these points; not to be changed by who gets it.

    Those that do not fill a generation wait. Cost: about 0.2 ms for each generation that this process has not seen.
    """
    optimizer = _begun(start)
    size = optimizer.population_size
    for i in range(0, len(ranked) // size * size, size):
        best_first = sorted(ranked[i : i + size], key=lambda one: one[0])
        optimizer = _told(start, optimizer, tuple(point for _, point in best_first))
    return optimizer


@lru_cache(maxsize=64)
def _begun(start: Point) -> Any:
    n = len(start)
    bounds = np.array([[0.0, 1.0]] * n)
    return cmaes.CMA(mean=np.array(start), sigma=SPREAD, bounds=bounds, n_max_resampling=10 * n, seed=0)


@lru_cache(maxsize=KEPT_GENERATIONS)
def _told(start: Point, before: Any, generation: Generation) -> Any:
    """The optimizer after one more generation; begun anew where it has come to rest, or out of the numbers' range.

    `before` is told apart by identity: it is itself a result of this function, or of `_begun`.
    """
    after = copy.deepcopy(before)
    try:
        with np.errstate(all="ignore"):
            after.tell([(np.array(point), float(rank)) for rank, point in enumerate(generation)])
            is_at_rest = after.should_stop() or not np.isfinite(after.mean).all()
    except np.linalg.LinAlgError:
        is_at_rest = True
    return _begun(start) if is_at_rest else after
