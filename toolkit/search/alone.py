"""Trials that no stack holds (DoRA, PiSSA, full, PEFT's other kinds): through fit/one, one after another."""

import math
import signal
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from toolkit.adapters.kinds import kind_of
from toolkit.bases.load import LoadedBase, load_base
from toolkit.bundle import Run
from toolkit.disk import make_folder, remove
from toolkit.errors import TrainingError
from toolkit.evaluate.talk import held_out_loss
from toolkit.fit.display import Display
from toolkit.fit.fitted import Fitted
from toolkit.fit.one import Job, fit_one
from toolkit.fit.plan import count_steps, evaluation_steps
from toolkit.fit.prepare import training_rows, weight_dtype
from toolkit.recipe.model import Base, Recipe
from toolkit.search import ledger
from toolkit.search.crew import REFUSALS, Crew, Ground, facts_of
from toolkit.search.study import Asked
from toolkit.track import open_track


class Pruned(Exception):
    """The study does not want this trial to go on."""


class _Silent(Display):
    """The table of the search speaks; a step is a sign of life, and asks whether to go on."""

    def __init__(self, crew: Crew, total: int) -> None:
        super().__init__(Console(quiet=True), total, is_quiet=True)
        self._crew, self._is_told = crew, False
        self.n_tokens = 0

    def step(self, step: int, loss: float, n_tokens: int) -> None:
        """One optimizer step is done."""
        self.n_tokens = n_tokens
        self._crew.show()
        if self._crew.wants_stop() and not self._is_told:
            self._is_told = True
            signal.raise_signal(signal.SIGTERM)  # the wish that whoever trains listens to

    def say(self, text: str) -> None:
        """A line between."""
        self._crew.table.say(text)


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
    kind = kind_of(recipe.adapter)
    plan = ground.plan(recipe)
    base = _fresh_base(ground, recipe)
    learned = training_rows(recipe, base, ground.rows.of(recipe))
    ids = ground.token_ids(recipe)
    model = kind.attach(base.model, recipe.adapter, seed=recipe.train.seed, token_ids=ids, tokenizer=base.tokenizer)
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    n_steps = count_steps(len(learned), recipe)[1]
    looks = _Looks(crew, asked, base, _look_steps(recipe, len(learned)), run)
    job = Job(
        recipe=recipe,
        plan=plan,
        model=model,
        tokenizer=base.tokenizer,
        rows=learned,
        evaluate=looks.evaluate,
        run=run,
        track=open_track(run.path, (), {}, 0, crew.table.say),
    )
    silent = _Silent(crew, n_steps)
    started = time.monotonic()
    try:
        fitted = fit_one(job, lambda _: silent)
    except Pruned:
        fitted = looks.pruned(time.monotonic() - started, silent.n_tokens)
    finally:
        job.track.close()
    if fitted.stopped == "asked":
        return False
    model.eval()
    facts = facts_of(asked, fitted, n_steps, size)
    crew.ended(asked, fitted, facts, lambda folder: _save(folder, kind, model, base))
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
        if not is_last and self._crew.study.should_prune(number):
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


def _fresh_base(ground: Ground, recipe: Recipe) -> LoadedBase:
    assert isinstance(recipe.base, Base)  # a search over a base from scratch is refused when the recipe is read
    device = str(ground.base.device)
    return load_base(recipe.base, device, weight_dtype(recipe, device))


def _save(folder: Path, kind: Any, model: nn.Module, base: LoadedBase) -> None:
    name = "model" if kind.name == "full" else "adapter"
    (folder / name).mkdir()
    kind.save(model, folder / name, base=base.source, base_hash=base.hash)
    if kind.name == "full":
        base.tokenizer.chat_template = base.template
        base.tokenizer.save_pretrained(folder / name)
