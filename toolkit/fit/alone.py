"""One adapter of several that no stack holds (DoRA, PiSSA, full, PEFT's other kinds): through fit/one, on a fresh base.

Whoever trains the several speaks for it: nothing is shown here, and its wish to stop is asked for at every step.
"""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from toolkit.adapters.contract import Kind
from toolkit.adapters.kinds import kind_of
from toolkit.bases.load import LoadedBase, load_base
from toolkit.bundle import Run
from toolkit.fit.batches import Row
from toolkit.fit.display import Display
from toolkit.fit.fitted import Fitted
from toolkit.fit.one import Job, fit_one
from toolkit.fit.plan import Plan, count_steps
from toolkit.fit.prepare import weight_dtype
from toolkit.recipe.model import Base, Recipe
from toolkit.track import open_track


@dataclass(frozen=True)
class Worn:
    """A base of its own and the adapter that learns on it. `model`: both together."""

    base: LoadedBase
    kind: Kind[Any]
    model: nn.Module

    @property
    def n_parameters(self) -> int:
        """How many numbers learn."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def save(self, folder: Path) -> None:
        """Write it into a folder that is there; a whole model together with its tokenizer."""
        self.kind.save(self.model, folder, base=self.base.source, base_hash=self.base.hash)
        if self.kind.name == "full":
            self.base.tokenizer.chat_template = self.base.template
            self.base.tokenizer.save_pretrained(folder)


def wear(recipe: Recipe, device: torch.device, token_ids: Sequence[int] | None) -> Worn:
    """The recipe's new adapter on its base, loaded afresh. token_ids: what an embedding adapter learns.

    Raises: AdapterError where the two do not fit. Cost: loading the base.
    """
    assert isinstance(recipe.base, Base)  # several adapters on a base from scratch: refused when the recipe is read
    kind = kind_of(recipe.adapter)
    base = load_base(recipe.base, str(device), weight_dtype(recipe, str(device)))
    seed = recipe.train.seed
    model = kind.attach(base.model, recipe.adapter, seed=seed, token_ids=token_ids, tokenizer=base.tokenizer)
    return Worn(base, kind, model)


@dataclass(frozen=True)
class Lesson:
    """What one that learns alone is given: the rows of an epoch, and how its held-out loss is measured."""

    recipe: Recipe
    plan: Plan
    rows: Sequence[Row]
    evaluate: Callable[[nn.Module], float] | None

    @property
    def n_steps(self) -> int:
        """Optimizer steps to its end."""
        return count_steps(len(self.rows), self.recipe)[1]


class Silent(Display):
    """Shows nothing: every step is passed on, and so is the wish to stop.

    heard: is told step, training loss and tokens so far. valid_heard: step and held-out loss.
    """

    def __init__(
        self,
        total: int,
        say: Callable[[str], None],
        wants_stop: Callable[[], bool],
        heard: Callable[[int, float, int], None],
        valid_heard: Callable[[int, float], None] = lambda step, loss: None,
    ) -> None:
        super().__init__(Console(quiet=True), total, is_quiet=True)
        self._speak, self._wants_stop, self._heard, self._valid_heard = say, wants_stop, heard, valid_heard
        self._is_told = False
        self.n_tokens = 0

    def step(self, step: int, loss: float, n_tokens: int) -> None:
        """One optimizer step is done."""
        self.n_tokens = n_tokens
        self._heard(step, loss, n_tokens)
        if self._wants_stop() and not self._is_told:
            self._is_told = True
            signal.raise_signal(signal.SIGTERM)  # the wish that whoever trains listens to

    def valid(self, step: int, loss: float, best: float) -> None:
        """A held-out loss was measured."""
        self._valid_heard(step, loss)

    def say(self, text: str) -> None:
        """A line between."""
        self._speak(text)


def fit_worn(worn: Worn, lesson: Lesson, run: Run, silent: Silent) -> Fitted:
    """Train it, from the last checkpoint under `run` when there is one; `worn` has its best tensors then.

    Raises and costs: as fit_one.
    """
    track = open_track(run.path, (), {}, 0, silent.say)
    job = Job(
        recipe=lesson.recipe,
        plan=lesson.plan,
        model=worn.model,
        tokenizer=worn.base.tokenizer,
        rows=lesson.rows,
        evaluate=lesson.evaluate,
        run=run,
        track=track,
    )
    try:
        fitted = fit_one(job, lambda _: silent)
    finally:
        track.close()
    worn.model.eval()
    return fitted
