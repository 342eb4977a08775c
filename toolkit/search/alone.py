"""Trials that no stack holds (DoRA, PiSSA, full, PEFT's other kinds): through fit/one, one after another."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from toolkit.adapters.kinds import kind_of
from toolkit.bases.load import LoadedBase, load_base
from toolkit.bundle import Run
from toolkit.disk import make_folder, remove
from toolkit.errors import MaltuError
from toolkit.evaluate.talk import held_out_loss
from toolkit.fit.display import Display
from toolkit.fit.fitted import Fitted
from toolkit.fit.one import Job, fit_one
from toolkit.fit.prepare import training_rows
from toolkit.recipe.model import Base, Recipe
from toolkit.search import ledger
from toolkit.search.crew import Crew, Ground
from toolkit.search.study import Asked
from toolkit.track import open_track


class Pruned(Exception):
    """The study does not want this trial to go on."""


class _Silent(Display):
    """The table of the search speaks; a step is a sign of life."""

    def __init__(self, crew: Crew, total: int) -> None:
        super().__init__(Console(quiet=True), total, is_quiet=True)
        self._crew = crew

    def step(self, step: int, loss: float, n_tokens: int) -> None:
        """One optimizer step is done."""
        self._crew.show()

    def say(self, text: str) -> None:
        """A line between."""
        self._crew.table.say(text)


def fit_alone(crew: Crew, asked: Asked) -> bool:
    """Train one trial on a base of its own, report its evaluations, tell how it ended; False: it was asked to stop.

    It goes on from the checkpoint of an earlier attempt. Cost: as fit_one, and loading the base once more.
    """
    ground, recipe, study = crew.ground, asked.recipe, crew.study
    run = Run(_place(crew, asked))
    kind = kind_of(recipe.adapter)
    base = _fresh_base(ground, recipe)
    model = kind.attach(
        base.model,
        recipe.adapter,
        seed=recipe.train.seed,
        token_ids=ground.token_ids(recipe),
        tokenizer=base.tokenizer,
    )
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    losses: list[float] = []

    def evaluate(model: nn.Module) -> float:
        loss = held_out_loss(model, base.tokenizer, ground.rows.of(ground.recipe).valid).loss
        losses.append(loss)
        study.report(asked.number, len(losses) + n_before, loss)
        crew.show()
        if study.should_prune(asked.number):
            raise Pruned
        return loss

    n_before = 0
    for number, loss in asked.values.items() if run.last_checkpoint() else ():
        study.report(asked.number, number, loss)
        n_before = number
    job = Job(
        recipe=recipe,
        plan=ground.plan(recipe),
        model=model,
        tokenizer=base.tokenizer,
        rows=training_rows(recipe, base, ground.rows.of(recipe)),
        evaluate=evaluate,
        run=run,
        track=open_track(run.path, (), {}, 0, crew.table.say),
    )
    started = time.monotonic()
    try:
        fitted = fit_one(job, lambda total: _Silent(crew, total))
    except Pruned:
        fitted = Fitted("pruned", _steps(run), None, min(losses), time.monotonic() - started, 0)
    except MaltuError as failed:
        study.fail(asked.number, str(failed), {"kind": kind.name})
        return True
    finally:
        job.track.close()
    if fitted.stopped == "asked":
        return False
    model.eval()
    crew.ended(asked, fitted, size, lambda folder: _save(folder, kind, model, base))
    remove(run.path)
    return True


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
    return load_base(recipe.base, str(ground.base.device), ground.base.dtype)


def _steps(run: Run) -> int:
    """The step of the last line that the trial wrote down."""
    from toolkit.track import read_metrics

    return int(max((line.get("step", 0) for line in read_metrics(run.path)), default=0))


def _save(folder: Path, kind: Any, model: nn.Module, base: LoadedBase) -> None:
    name = "model" if kind.name == "full" else "adapter"
    (folder / name).mkdir()
    kind.save(model, folder / name, base=base.source, base_hash=base.hash)
    if kind.name == "full":
        base.tokenizer.chat_template = base.template
        base.tokenizer.save_pretrained(folder / name)
