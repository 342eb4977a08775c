"""One candidate that is an encoder, for labels: the same minutes at the same three rates, one after another, since no
stack holds it.
"""

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from toolkit import disk
from toolkit.bases.encoder import LoadedEncoder, load_encoder
from toolkit.bundle import Run
from toolkit.choose.job import Job as Audition
from toolkit.choose.lesson import FACTORS, LOOKS, MARGIN, N_WATCHED, PACE_STEPS, some
from toolkit.choose.measure import nats_by_text
from toolkit.choose.result import Result
from toolkit.choose.stand import N_TALKS, NATS, finite
from toolkit.corpus.gather import gather
from toolkit.corpus.talk import Talk
from toolkit.errors import DataError, Problem, TrainingError
from toolkit.evaluate.classify import label_set
from toolkit.evaluate.encoder import Labeller, pad_of
from toolkit.fit.alone import Silent
from toolkit.fit.classify import (
    LabelRows,
    epoch_rows,
    fit_labels,
    held_out_log_loss,
    label_plan,
    label_rows,
    refuse_misfits,
    with_adapter,
)
from toolkit.fit.fitted import Fitted
from toolkit.fit.memory import peak_mb
from toolkit.fit.one import Job
from toolkit.fit.plan import Plan, count_steps, max_length
from toolkit.fit.prepare import place_here, weight_dtype
from toolkit.judge import Held, measured_labels, metrics_of
from toolkit.recipe.model import Base, Recipe
from toolkit.track import open_track


@dataclass(frozen=True)
class _Ground:
    """What the rates share. load: the encoder afresh."""

    recipe: Recipe
    plan: Plan
    rows: LabelRows
    load: Callable[[], LoadedEncoder]
    place: Path
    wants_stop: Callable[[], bool]

    @property
    def watched(self) -> Sequence[Any]:
        """Some of the texts that say which rate is best."""
        return some(self.rows.valid or self.rows.test, N_WATCHED)


@dataclass(frozen=True)
class _Taught:
    """One rate: the model it made, and how long a step and an evaluation took."""

    model: nn.Module
    rate: float
    fitted: Fitted
    step_s: float
    look_s: float


def audition_encoder(recipe: Recipe, job: Audition, wants_stop: Callable[[], bool]) -> Result:
    """Load, teach and measure an encoder. `recipe`: its own (job.recipe_of). `before` is chance: its head is random.

    Raises: what audition raises, and RecipeError for a recipe that an encoder has no use for.
    """
    started = time.monotonic()
    refuse_misfits(recipe)
    assert isinstance(recipe.base, Base)  # recipe_of made it
    named = recipe.base
    corpus = gather(recipe.data, recipe.train.seed, None)
    labels = label_set(tuple(corpus.train))
    device = place_here().device
    base = load_encoder(named, labels, device, weight_dtype(recipe, device), seed=recipe.train.seed)
    rows = label_rows(recipe, corpus, base, max_length(recipe, base.context))
    numbers = some(rows.kept_talks[rows.held_out()], N_TALKS)
    talks: list[Talk] = [getattr(corpus, rows.held_out())[number] for number in numbers]
    if not talks:
        says = "no held-out text is left to measure on. Set data.test: 0.1, or a longer train.max_length"
        raise DataError(recipe.name, [Problem("data.test", says)])
    with tempfile.TemporaryDirectory() as made:
        plan = label_plan(recipe, base, rows, place_here())
        dtype = weight_dtype(recipe, device)
        load = partial(load_encoder, named, labels, device, dtype, seed=recipe.train.seed)
        ground = _Ground(recipe, plan, rows, load, Path(made), wants_stop)
        best, told, seconds, n_tokens = _rates(ground, job.minutes)
    memory = peak_mb(base.device)
    labeller = Labeller(best.model, base.tokenizer, base.labels)
    nats = nats_by_text(talks, labeller.labelled(talks, labels))
    measured = measured_labels(labeller, Held(tuple(talks), (), (), labels, (), metrics_of(recipe)))
    return Result(
        key=job.key,
        model=job.model,
        base_hash=base.hash,
        device=device,
        minutes=job.minutes,
        measure=NATS,
        talks={str(number): (of, math.log(len(labels)), 1.0) for number, of in zip(numbers, nats, strict=True)},
        n_unknown=0,  # what it cannot read costs it labels, and gives it nothing
        rates=tuple(told),
        learning_rate=best.rate,
        seconds=seconds,
        steps=best.fitted.steps,
        steps_asked=count_steps(len(epoch_rows(recipe, rows)), recipe)[1],
        n_tokens=n_tokens,
        parameters=sum(parameter.numel() for parameter in base.model.parameters()),
        context=base.context,
        template_from="none: an encoder",
        memory_mb=memory,
        wall_s=time.monotonic() - started,
        numbers={name: finite(of) for name, of in measured.items() if name != "confusion"},
        notes=_notes(rows),
    )


def _notes(rows: LabelRows) -> tuple[str, ...]:
    share = rows.n_unknown / max(1, rows.n_tokens)
    told = f"{share:.1%} of the tokens are signs that its tokenizer does not know"
    return ("an encoder: its bare head is random, so bare is chance", *([told] * bool(rows.n_unknown)))


def _rates(ground: _Ground, minutes: float) -> tuple[_Taught, list[dict[str, Any]], float, int]:
    """The best of the rates, what is told of each, and the seconds and tokens of all. Raises: TrainingError."""
    asked = count_steps(len(epoch_rows(ground.recipe, ground.rows)), ground.recipe)[1]
    pace = _teach(ground, ground.plan.learning_rate, min(PACE_STEPS, asked), 1, "pace")
    spent, n_tokens = pace.fitted.seconds, 0
    told: list[dict[str, Any]] = []
    best: _Taught | None = None
    for number, factor in enumerate(FACTORS):
        rate = factor * ground.plan.learning_rate
        left = MARGIN * (60 * minutes - spent) / (len(FACTORS) - number) - LOOKS * pace.look_s
        steps = max(1, min(asked, int(left / max(pace.step_s, 1e-6))))
        try:
            one = _teach(ground, rate, steps, LOOKS, f"rate-{number}")
        except TrainingError as failed:
            if ground.wants_stop():
                raise
            told.append({"learning_rate": rate, "steps": 0, "best_step": None, "loss": None, "failed": str(failed)})
            continue
        fitted = one.fitted
        spent, n_tokens = spent + fitted.seconds, n_tokens + fitted.n_tokens
        told.append(
            {"learning_rate": rate, "steps": fitted.steps, "best_step": fitted.best_step, "loss": fitted.best_loss}
        )
        if best is None or (fitted.best_loss or math.inf) < (best.fitted.best_loss or math.inf):
            best = one
    if best is None:
        raise TrainingError(str(told[0]["failed"]))
    return best, told, spent, n_tokens


def _teach(ground: _Ground, rate: float, steps: int, looks: int, name: str) -> _Taught:
    """So many steps at this rate, with so many evaluations, on a fresh encoder."""
    base = ground.load()
    learnable = epoch_rows(ground.recipe, ground.rows)
    per_epoch = count_steps(len(learnable), ground.recipe)[0]
    told = {"max_steps": steps, "evaluate_every": steps / (looks * per_epoch), "early_stop_patience": None}
    train = ground.recipe.train.model_copy(update={**told, "learning_rate": rate})
    recipe = ground.recipe.model_copy(update={"train": train})
    run = Run(ground.place / name)
    disk.make_folder(run.path)
    marks, looked = [time.monotonic()], [0.0]

    def evaluate(model: nn.Module) -> float:
        began = time.monotonic()
        loss = held_out_log_loss(model, ground.watched, pad_of(base.tokenizer))
        looked.append(time.monotonic() - began)
        return loss

    silent = Silent(steps, lambda _: None, ground.wants_stop, lambda *_: marks.append(time.monotonic()))
    track = open_track(run.path, (), {}, 0, lambda _: None)
    plan = replace(ground.plan, learning_rate=rate)
    job = Job(recipe, plan, with_adapter(recipe, base), base.tokenizer, learnable, evaluate, run, track)
    fitted = fit_labels(job, lambda _: silent)
    track.close()
    if fitted.stopped == "asked":
        raise TrainingError("told to stop")
    job.model.eval()
    spans = [after - before for before, after in itertools.pairwise(marks)]
    return _Taught(job.model, rate, fitted, min(spans, default=0.0), max(looked))
