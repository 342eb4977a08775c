"""One candidate learns for some minutes by the clock: a LoRA at three learning rates, side by side in a stack."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from toolkit.bases.load import LoadedBase
from toolkit.choose.crew import Crew
from toolkit.errors import TrainingError
from toolkit.fit.batches import Row
from toolkit.fit.many import Setup, fit_many
from toolkit.fit.member import Member
from toolkit.fit.plan import Plan, count_steps, make_plan
from toolkit.fit.prepare import Rows, place_here, shape_of, training_rows
from toolkit.recipe.model import Recipe
from toolkit.search.split import limits_of
from toolkit.stack.adapter import Adapter, new_adapter
from toolkit.stack.stack import Stack

T = TypeVar("T")
FACTORS = (1 / 3, 1.0, 3.0)  # of the learning rate that the recipe gives, or `auto` means on this base
LOOKS = 3  # evaluations of each rate
N_WATCHED = 64  # held-out conversations of an evaluation
PACE_STEPS = 3  # steps that are taken to learn how long one takes
MARGIN = 0.95  # of the time that is left is planned with; the clock ends what takes longer


@dataclass(frozen=True)
class Learned:
    """The best of the rates, and what all of them cost. See result.py for the names."""

    adapter: Adapter
    learning_rate: float
    rates: tuple[dict[str, Any], ...]
    seconds: float
    steps: int
    steps_asked: int
    n_tokens: int


@dataclass(frozen=True)
class _Ground:
    """What the rates share."""

    recipe: Recipe
    plan: Plan
    rows: Sequence[Row]
    watched: Sequence[Row]
    adapter: Adapter


def learn(
    recipe: Recipe, base: LoadedBase, rows: Rows, minutes: float, place: Path, wants_stop: Callable[[], bool]
) -> Learned:
    """Let the recipe's adapter learn on this base for so long, or to the recipe's own end where that comes earlier.

    The schedule is laid out for the steps that the time allows, which a few steps measured first tell; these belong to
    the time. `place`: where checkpoints go while it learns. The base is left as it was.
    Raises: AdapterError for a base that no stack takes, TrainingError where every rate failed or it was told to stop.
    """
    stack = Stack(base.model, base_hash=base.hash)
    try:
        ground, setup = _ground(recipe, base, rows)
        started = time.monotonic()
        until = started + 60 * minutes
        asked = count_steps(len(ground.rows), recipe)[1]
        fits = _steps_that_fit(stack, ground, setup, place, until)
        crew = Crew(_members(ground, max(1, min(asked, fits)), LOOKS), until, wants_stop)
        if not fit_many(stack, crew, setup, place):
            raise TrainingError("told to stop")
        seconds = time.monotonic() - started
    finally:
        stack.close()
    best = crew.best()
    if best is None:
        raise TrainingError(next(iter(crew.reasons.values()), "nothing was learned"))
    return Learned(
        adapter=crew.adapters[best],
        learning_rate=_rates(ground)[best],
        rates=tuple(_told(name, rate, crew) for name, rate in _rates(ground).items()),
        seconds=seconds,
        steps=crew.fitted[best].steps,
        steps_asked=asked,
        n_tokens=sum(fitted.n_tokens for fitted in crew.fitted.values()),
    )


def _ground(recipe: Recipe, base: LoadedBase, rows: Rows) -> tuple[_Ground, Setup]:
    shape, place = shape_of(base.model, base.context), place_here()
    longest = max(len(row.input_ids) for row in (*rows.train, *rows.valid, *rows.test))
    plan = make_plan(recipe, shape, place, longest)
    watched = [(row.input_ids, row.labels) for row in some(rows.valid or rows.test, N_WATCHED)]
    adapter = new_adapter(base.model, recipe.adapter, seed=recipe.train.seed, tokenizer=base.tokenizer)
    ground = _Ground(recipe, plan, training_rows(recipe, base, rows), watched, adapter)
    limits = limits_of(shape, place, plan, longest)
    return ground, Setup(len(FACTORS), limits, base.tokenizer.pad_token_id or 0, plan.precision)


def some(rows: Sequence[T], most: int) -> list[T]:
    """At most so many of them, spread evenly over all."""
    return [rows[at * len(rows) // most] for at in range(most)] if len(rows) > most else list(rows)


def _rates(ground: _Ground) -> dict[str, float]:
    return {f"rate-{number}": factor * ground.plan.learning_rate for number, factor in enumerate(FACTORS)}


def _members(ground: _Ground, total: int, looks: int) -> list[Member]:
    """A member for each rate, with `total` steps and so many evaluations, all from the same start."""
    per_epoch = count_steps(len(ground.rows), ground.recipe)[0]
    every = total / (looks * per_epoch)
    told = {"max_steps": total, "evaluate_every": every, "early_stop_patience": None}
    found = []
    for name, rate in _rates(ground).items():
        train = ground.recipe.train.model_copy(update={**told, "learning_rate": rate})
        recipe = ground.recipe.model_copy(update={"train": train})
        tensors = {key: tensor.clone() for key, tensor in ground.adapter.tensors.items()}
        adapter = replace(ground.adapter, tensors=tensors)
        plan = replace(ground.plan, learning_rate=rate)
        found.append(Member(name, recipe, plan, ground.rows, ground.watched, adapter))
    return found


def _steps_that_fit(stack: Stack, ground: _Ground, setup: Setup, place: Path, until: float) -> int:
    """How many steps the time that is left allows, evaluations counted; tried on a few that are thrown away."""
    started = time.monotonic()
    crew = Crew(_members(ground, PACE_STEPS, 1), until, lambda: False)
    fit_many(stack, crew, setup, place)
    marks = [started, *crew.stepped_at]
    spans = [after - before for before, after in itertools.pairwise(marks)]
    if not spans:
        return 1  # every rate failed at once; the fit itself will say why
    step_s = spans[1] if len(spans) > 2 else spans[0]  # the first one warms up, the last one holds an evaluation
    look_s = max(0.0, spans[-1] - step_s) if len(spans) > 2 else 0.0
    left = MARGIN * (until - time.monotonic()) - LOOKS * look_s
    return int(left / max(step_s, 1e-6))


def _told(name: str, rate: float, crew: Crew) -> dict[str, Any]:
    fitted = crew.fitted[name]
    told = {"learning_rate": rate, "steps": fitted.steps, "best_step": fitted.best_step, "loss": fitted.best_loss}
    return {**told, **({"failed": crew.reasons[name]} if name in crew.reasons else {})}
