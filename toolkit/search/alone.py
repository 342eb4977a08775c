"""Trials that no stack holds (DoRA, PiSSA, full, PEFT's other kinds): through fit/one, one after another."""

import math
import time
from pathlib import Path

from torch import nn

from toolkit.bases.load import LoadedBase
from toolkit.bundle import Run
from toolkit.disk import make_folder, remove
from toolkit.errors import TrainingError
from toolkit.evaluate.talk import held_out_loss
from toolkit.fit.alone import Lesson, Silent, Worn, fit_worn, wear
from toolkit.fit.fitted import Fitted
from toolkit.fit.plan import count_steps, evaluation_steps, is_judged
from toolkit.fit.prepare import training_rows
from toolkit.loaded import WHOLE_MODEL
from toolkit.recipe.model import Recipe
from toolkit.search import ledger
from toolkit.search.crew import REFUSALS, Crew, facts_of
from toolkit.search.study import Asked


class Pruned(Exception):
    """The study does not want this trial to go on."""


def fit_alone(crew: Crew, asked: Asked) -> bool:
    """Train one trial on a base of its own, report its evaluations, tell how it ended; False: it was asked to stop.

    It goes on from the checkpoint of an earlier attempt. Cost: as fit_one, and loading the base once more.
    """
    run = Run(_place(crew, asked))
    try:
        is_told = _fit(crew, asked, run)
    except (*REFUSALS, TrainingError) as failed:
        crew.study.fail(asked.number, str(failed), {"kind": asked.recipe.adapter.kind})
        is_told = True
    if is_told:
        remove(run.path)
    return is_told


def _fit(crew: Crew, asked: Asked, run: Run) -> bool:
    ground, recipe = crew.ground, asked.recipe
    worn = wear(recipe, ground.base.device, ground.token_ids(recipe))
    learned = training_rows(recipe, worn.base, ground.rows.of(recipe))
    looks = _Looks(crew, asked, worn.base, _look_steps(recipe, len(learned)), run)
    lesson = Lesson(recipe, ground.plan(recipe), learned, looks.evaluate)
    silent = Silent(lesson.n_steps, crew.table.say, crew.wants_stop, lambda *_: crew.show())
    size = worn.n_parameters
    started = time.monotonic()
    try:
        fitted = fit_worn(worn, lesson, run, silent)
    except Pruned:
        fitted = looks.pruned(time.monotonic() - started, silent.n_tokens)
    if fitted.stopped == "asked":
        return False
    facts = facts_of(asked, fitted, lesson.n_steps, size)
    crew.ended(asked, fitted, facts, lambda folder: _save(folder, worn))
    return True


def _look_steps(recipe: Recipe, n_rows: int) -> tuple[int, ...]:
    per_epoch, total = count_steps(n_rows, recipe)
    return evaluation_steps(per_epoch, total, recipe.train.evaluate_every)


class _Looks:
    """The evaluations of one trial, told to the study as they come, those before its last checkpoint among them."""

    def __init__(self, crew: Crew, asked: Asked, base: LoadedBase, steps: tuple[int, ...], run: Run) -> None:
        self._crew, self._asked, self._base, self._steps = crew, asked, base, steps
        self._losses: list[float] = []
        last = run.last_checkpoint()
        if last is None:
            return
        step = int(last.name.removeprefix("step-"))
        for number in range(1, sum(look <= step for look in steps) + 1):
            if number not in asked.values:
                break
            self._tell(asked.values[number])

    def _tell(self, loss: float) -> None:
        self._losses.append(loss)
        self._crew.study.report(self._asked.number, len(self._losses), loss)

    def evaluate(self, model: nn.Module) -> float:
        """The held-out loss. Raises Pruned where the study does not want the trial to go on."""
        ground, number = self._crew.ground, self._asked.number
        loss = held_out_loss(model, self._base.tokenizer, ground.rows.of(ground.recipe).valid).loss
        if not math.isfinite(loss):
            return loss  # which ends the trial
        self._tell(loss)
        self._crew.show()
        is_last = len(self._losses) >= len(self._steps)  # it has cost what it costs
        step = self._steps[len(self._losses) - 1]
        may_end = not is_last and is_judged(self._asked.recipe.train, self._steps[-1], step)
        if may_end and self._crew.study.should_prune(number):
            raise Pruned
        return loss

    def pruned(self, seconds: float, n_tokens: int) -> Fitted:
        """How the trial stood when it was ended."""
        best = min(self._losses)
        steps = self._steps[len(self._losses) - 1]
        return Fitted("pruned", steps, self._steps[self._losses.index(best)], best, seconds, n_tokens)


def _place(crew: Crew, asked: Asked) -> Path:
    """Where the trial keeps its checkpoints; those of an earlier attempt are taken over."""
    folder = crew.place / f"alone-{asked.number}"
    make_folder(crew.place)
    by_number = {trial.number: trial for trial in crew.study.trials()}
    number = asked.again_of
    while number is not None and not folder.exists():
        for left in crew.ground.checkpoints.glob(f"worker-*/alone-{number}"):
            left.rename(folder)
            return folder
        number = ledger.again_of(by_number[number]) if number in by_number else None
    make_folder(folder)
    return folder


def _save(folder: Path, worn: Worn) -> None:
    name = WHOLE_MODEL if worn.kind.name == "full" else "adapter"
    (folder / name).mkdir()
    worn.save(folder / name)
