"""What the ended and running trials of a study say: losses, kinds, counts, and their values in few words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from toolkit.search.ledger import is_lost, is_void
from toolkit.search.space import KIND

DIGITS = 4
LONGEST = 32  # signs of a value among others


@dataclass(frozen=True)
class Counts:
    """How many trials there are by state; `lost` are those of workers that died, which are asked again."""

    complete: int
    pruned: int
    failed: int
    lost: int
    running: int

    @property
    def ended(self) -> int:
        """Those that used up the budget."""
        return self.complete + self.pruned + self.failed


def is_repeated(trial: FrozenTrial) -> bool:
    """Whether another trial stands for this one: its worker died, or another had its place."""
    return is_lost(trial) or is_void(trial)


def count(trials: Sequence[FrozenTrial]) -> Counts:
    """Trials by state."""
    states = [trial.state for trial in trials if not is_repeated(trial)]
    return Counts(
        complete=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED),
        failed=states.count(TrialState.FAIL),
        lost=sum(map(is_lost, trials)),
        running=states.count(TrialState.RUNNING),
    )


def final_loss(trial: FrozenTrial) -> float | None:
    """The loss of a trial that was trained to the end; None for every other, and for one that is not finite."""
    if trial.state != TrialState.COMPLETE or trial.value is None or not math.isfinite(trial.value):
        return None
    return trial.value


def lowest_loss(trial: FrozenTrial) -> float | None:
    """The lowest held-out loss that a trial came to, pruned or not; None where it reported none that is finite."""
    final = final_loss(trial)
    losses = [loss for loss in trial.intermediate_values.values() if math.isfinite(loss)]
    return final if final is not None else min(losses, default=None)


def by_loss(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that were trained to the end, the best first, of equal ones the older."""
    losses = [(loss, trial.number, trial) for trial in trials if (loss := final_loss(trial)) is not None]
    return [trial for _, _, trial in sorted(losses, key=lambda one: one[:2])]


def kind_of(trial: FrozenTrial) -> str | None:
    """The adapter kind that the search chose for the trial; None where the search has no kinds to choose from."""
    kind = trial.params.get(KIND)
    return None if kind is None else str(kind)


def number_of(trial: FrozenTrial, name: str) -> float | None:
    """A fact of a trial that is a finite number (steps, seconds, memory_mb); None where it has none."""
    value = trial.user_attrs.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def say_value(value: Any) -> str:
    """A parameter's value in few signs: 4 digits of a float, the rest as it is, on one line."""
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}"
    return "null" if value is None else " ".join(str(value).split())


def say_values(values: Mapping[str, Any]) -> str:
    """`learning_rate 0.003, batch_size 8`: each name as short as it can be, long values cut."""
    short = short_names(list(values))
    return ", ".join(f"{short[name]} {say_shortly(value)}" for name, value in values.items())


def say_shortly(value: Any) -> str:
    """A value as `say_value` says it, cut where it is long."""
    text = say_value(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last parts of dotted names: one part, or as many as it takes to tell them apart."""
    parts = {name: name.replace("/", ".").split(".") for name in names}
    found: dict[str, str] = {}
    for name, own in parts.items():
        others = [other for key, other in parts.items() if key != name]
        n = next((n for n in range(1, len(own)) if not any(other[-n:] == own[-n:] for other in others)), len(own))
        found[name] = ".".join(own[-n:])
    return found
