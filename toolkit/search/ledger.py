"""What the trials of a study amount to: which count, which are to be asked again, whether it is time to stop.

Workers agree without talking to each other: numbers are given out one after another by the storage, everybody sees all
lower ones, and of several trials that claim the same place the lowest number has it. Nothing here touches a storage.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

LOST = "lost"  # the reason of a failure: its worker died; it is asked again under a new number
LEFT = "left"  # likewise: its worker was asked to stop, so it is nobody's fault and does not count as an attempt
TWICE = "twice"  # the reason of a failure: another trial has its place; it was never tried
WORKER, AGAIN_OF, OWN, REASON = "worker", "again_of", "own", "reason"  # user attributes of a trial
FIXED = "fixed_params"  # Optuna's system attribute of values that are given, not proposed
MOST_ATTEMPTS = 5  # a trial whose process died so often is what kills it


def is_void(trial: FrozenTrial) -> bool:
    """Whether another trial has its place."""
    return trial.state == TrialState.FAIL and trial.user_attrs.get(REASON) == TWICE


def is_lost(trial: FrozenTrial) -> bool:
    """Whether it ended with its worker, and is to be asked again."""
    return trial.state == TrialState.FAIL and trial.user_attrs.get(REASON) in (LOST, LEFT)


def again_of(trial: FrozenTrial) -> int | None:
    """The number of the lost trial that this one repeats."""
    number = trial.user_attrs.get(AGAIN_OF)
    return None if number is None else int(number)


def originals(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that use up the budget: a lost one does, and what repeats it does not. One that waits to be begun,
    which no worker makes, does not.
    """
    begun = (trial for trial in trials if trial.state != TrialState.WAITING and not is_void(trial))
    return [trial for trial in begun if again_of(trial) is None]


def point(params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Values in a form that can be compared, free of rounding."""
    return tuple(sorted((name, f"{v:.9g}" if isinstance(v, float) else repr(v)) for name, v in params.items()))


def given(trial: FrozenTrial) -> Mapping[str, Any] | None:
    """The values that a trial was made with; None when they are proposed."""
    fixed: Mapping[str, Any] | None = trial.system_attrs.get(FIXED)
    return fixed


def stands(trial: FrozenTrial, trials: Sequence[FrozenTrial], budget: int) -> bool:
    """Whether a trial has its place, or a lower number has it."""
    before = [one for one in trials if one.number < trial.number and not is_void(one)]
    repeated = again_of(trial)
    if repeated is not None:
        return all(again_of(one) != repeated for one in before)
    before = originals(before)
    if len(before) >= budget or (trial.user_attrs.get(OWN) and any(one.user_attrs.get(OWN) for one in before)):
        return False
    values = given(trial)
    return values is None or all(given(one) is None or point(given(one) or {}) != point(values) for one in before)


def chain(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trial and the lost ones that it repeats, the oldest first."""
    by_number = {one.number: one for one in trials}
    found = [trial]
    while (number := again_of(found[0])) is not None and number in by_number:
        found.insert(0, by_number[number])
    return found


def to_ask_again(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Lost trials that nothing repeats yet."""
    repeated = {again_of(trial) for trial in trials if not is_void(trial)}
    return [trial for trial in trials if is_lost(trial) and trial.number not in repeated]


def values_of(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
    """The values that a trial was tried with, or was to be: it may have died before all were written down."""
    found: dict[str, Any] = {}
    for one in chain(trial, trials):
        found |= {**(given(one) or {}), **one.params}
    return found


def reported(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> dict[int, float]:
    """The losses that earlier attempts at a trial reported, by evaluation."""
    found: dict[int, float] = {}
    for one in chain(trial, trials)[:-1]:
        found |= one.intermediate_values
    return dict(sorted(found.items()))


def running(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that a worker is at; those that were begun by something else than a worker are not waited for."""
    return [trial for trial in trials if trial.state == TrialState.RUNNING and WORKER in trial.user_attrs]


def best(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """The trial that was trained to the end with the lowest loss; of equal ones the older."""
    ended = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None and math.isfinite(t.value)]
    return min(ended, key=lambda trial: (trial.value, trial.number), default=None)


def is_stale(trials: Sequence[FrozenTrial], patience: int) -> bool:
    """Whether so many trials ended since the best one, without a better one. Before the first result: never."""
    ended = [t for t in trials if t.state.is_finished() and not is_void(t) and not is_lost(t)]
    ended.sort(key=lambda trial: (trial.datetime_complete is None, trial.datetime_complete, trial.number))
    lowest, since = math.inf, 0
    for trial in ended:
        since += 1
        if trial.state == TrialState.COMPLETE and trial.value is not None and trial.value < lowest:
            lowest, since = trial.value, 0
    return lowest < math.inf and since >= patience


def time_used_s(spans: Iterable[tuple[float, float]]) -> float:
    """For how long at least one worker was there; a pause between two starts is not in it."""
    used, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        used += max(0.0, end - max(begin, until))
        until = max(until, end)
    return used
