"""Weights of a merge, searched: Optuna proposes numbers for the members, a held-out loss answers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import optuna

from toolkit.errors import SearchError
from toolkit.search.hushed import hushed

SMALLEST, LARGEST = 0.02, 1.5  # of a weight: at 1 an adapter is all there; at 0 all of them would leave no merge
FIRST_AT_RANDOM = 4  # of the trials, after the one with equal weights


@dataclass(frozen=True)
class Tried:
    """The weights of one trial, and what they came to; None: no number, or a merge that there is not."""

    weights: Mapping[str, float]
    loss: float | None


@dataclass(frozen=True)
class SearchedWeights:
    """The best weights, their loss, and every trial in order, the first with equal weights."""

    weights: Mapping[str, float]
    loss: float
    history: tuple[Tried, ...]

    @property
    def of_equal(self) -> float | None:
        """The loss of equal weights."""
        return self.history[0].loss


def search_weights(
    names: Sequence[str],
    loss_of: Callable[[Mapping[str, float]], float],
    *,
    trials: int,
    seed: int,
    tell: Callable[[int, Tried], None] = lambda number, tried: None,
) -> SearchedWeights:
    """Weights from 0.02 to 1.5 for each member, those with the lowest loss; equal ones that sum to 1 are tried first.

    The same seed and losses give the same trials. A Gaussian process proposes (Optuna's GPSampler): a merge has few
    members, and its loss has no noise. `tell` hears of every trial when it is over.
    Raises: SearchError when no trial has a finite loss, and what `loss_of` raises. Cost: `trials` calls of `loss_of`.
    """
    with hushed():
        sampler = optuna.samplers.GPSampler(
            seed=seed, n_startup_trials=FIRST_AT_RANDOM + 1, deterministic_objective=True
        )
        study = optuna.create_study(sampler=sampler, direction="minimize")
        study.enqueue_trial({name: 1.0 / len(names) for name in names})
    history: list[Tried] = []
    for number in range(trials):
        with hushed():
            trial = study.ask()
            weights = {name: trial.suggest_float(name, SMALLEST, LARGEST) for name in names}
        loss = loss_of(weights)
        tried = Tried(weights, loss if math.isfinite(loss) else None)
        with hushed():
            # One without a number counts as much worse than any: left out, it would be proposed again and again.
            worst = max((one.loss for one in history if one.loss is not None), default=0.0)
            study.tell(trial, 2 * abs(worst) + 1.0 if tried.loss is None else tried.loss)
        history.append(tried)
        tell(number, tried)
    sound = [tried for tried in history if tried.loss is not None]
    if not sound:
        raise SearchError(f"None of {trials} merges has a finite loss. Look at the training of its members.")
    best = min(sound, key=lambda tried: tried.loss if tried.loss is not None else math.inf)
    assert best.loss is not None  # as `sound` says
    return SearchedWeights(best.weights, best.loss, tuple(history))
