"""The trials of a search as members of a stack: asked of the study, told to it, their adapters kept."""

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolkit import disk
from toolkit.bases.load import LoadedBase
from toolkit.errors import AdapterError, DataError, RecipeError
from toolkit.fit.cached import CachedRows
from toolkit.fit.fitted import Fitted
from toolkit.fit.many import Look, find_saved
from toolkit.fit.member import STATE_FILE, Learner, Member, is_sound
from toolkit.fit.plan import Plan, count_steps, is_judged, make_plan
from toolkit.fit.prepare import place_here, shape_of, training_rows
from toolkit.fit.stackable import holds
from toolkit.recipe.model import Recipe
from toolkit.search import ledger
from toolkit.search.study import Asked, Study
from toolkit.search.table import Running, SearchTable
from toolkit.stack.adapter import Adapter, new_adapter, write_adapter

SHOW_S = 0.5
FITTED_FILE = "fitted.json"
REFUSALS = (AdapterError, DataError, RecipeError)  # a trial whose values do not do; anything else ends the search


@dataclass(frozen=True)
class Ground:
    """What all trials of a process stand on. `folder`: the run's search folder; `checkpoints`: the run's."""

    recipe: Recipe
    base: LoadedBase
    rows: CachedRows
    folder: Path
    checkpoints: Path

    def plan(self, recipe: Recipe) -> Plan:
        """What `auto` means for one trial. Raises RecipeError for numbers that contradict each other."""
        longest = max(len(row.input_ids) for row in self.rows.of(recipe).train)
        return make_plan(recipe, shape_of(self.base.model, self.base.context), place_here(), longest)

    def kept(self, number: int) -> Path:
        """Where a trial's adapter lies once it is the best."""
        return self.folder / "trials" / str(number)

    def token_ids(self, recipe: Recipe) -> list[int] | None:
        """The ids of the training talk: what an embedding adapter learns, and nobody else asks for."""
        if recipe.adapter.kind != "embedding":
            return None
        return sorted({i for row in self.rows.of(recipe).train for i in row.input_ids})


class Crew:
    """Keeps the promises of toolkit.fit.many.Crew for the trials of a study.

    `alone`: a trial that no stack holds, waiting for the stack to be empty. `wants_stop`: asked between steps.
    """

    def __init__(
        self, ground: Ground, study: Study, place: Path, table: SearchTable, wants_stop: Callable[[], bool]
    ) -> None:
        self.ground, self.study, self.place, self.table = ground, study, place, table
        self.wants_stop = wants_stop
        self.alone: Asked | None = None
        self.is_stackless = False  # the base is one that no stack takes
        self._asked: dict[str, Asked] = {}
        self._n_steps: dict[str, int] = {}
        self._learners: Sequence[Learner] = ()
        self._shown_at = 0.0

    # What fit_many asks

    def next(self) -> Member | None:
        """The next trial that a stack holds; None also where one waits that it does not."""
        while self.alone is None and not self.wants_stop():
            asked = self.study.ask()
            if asked is None:
                return None
            if self.is_stackless or not holds(asked.recipe):
                self.alone = asked
                return None
            try:
                return self._member(asked)
            except REFUSALS as refused:
                self.study.fail(asked.number, str(refused), {"kind": asked.recipe.adapter.kind})
        return None

    def looked(self, looks: Sequence[Look]) -> Collection[str]:
        """Tell the losses, then ask which are worth going on with: of those whose learning rate rises no longer."""
        for look in looks:
            self.study.report(self._number(look), look.number, look.loss)
        return [look.name for look in looks if self._is_judged(look) and self.study.should_prune(self._number(look))]

    def _number(self, look: Look) -> int:
        return self._asked[look.name].number

    def _is_judged(self, look: Look) -> bool:
        return is_judged(self._asked[look.name].recipe.train, self._n_steps[look.name], look.step)

    def left(self, name: str, fitted: Fitted, adapter: Adapter) -> None:
        """Keep the adapter where it is the best so far, then tell what the trial came to."""
        asked, n_steps = self._asked.pop(name), self._n_steps.pop(name)

        def fill(folder: Path) -> None:
            base = self.ground.base
            write_adapter(adapter, folder, base.model, base=base.source, base_hash=base.hash)

        size = sum(tensor.numel() for tensor in adapter.tensors.values())
        facts = facts_of(asked, fitted, n_steps, size)
        self.ended(asked, fitted, facts, lambda target: _in_fresh_folder(target / "adapter", fill))

    def failed(self, name: str, fitted: Fitted, reason: str) -> None:
        """Tell why it came to nothing."""
        asked, n_steps = self._asked.pop(name), self._n_steps.pop(name)
        self.study.fail(asked.number, reason, facts_of(asked, fitted, n_steps, 0))

    def alive(self) -> None:
        """A sign of life, in passes that take long."""
        self.study.beat()

    def stepped(self, learners: Sequence[Learner], losses: Mapping[str, float]) -> bool:
        """Show how it goes and say that this process lives; whether somebody wants it to stop."""
        self._learners = learners
        if self.wants_stop():  # first: a study that cannot be reached is waited for
            return True
        self.show()
        return False

    # What the search does beside

    def show(self, *, is_last: bool = False) -> None:
        """The table, twice a second at most, and a sign of life. `is_last`: at once, since nothing follows."""
        if time.monotonic() - self._shown_at < SHOW_S and not is_last:
            return
        self._shown_at = time.monotonic()
        self.study.beat()
        seen = self.study.glance()
        if seen is None:
            return
        trials, seconds_left = seen
        here = {self._asked[one.name].number: one for one in self._learners if one.name in self._asked}
        running = [self._running(trial, here.get(trial.number)) for trial in ledger.running(trials)]
        self.table.show(running, trials, seconds_left)

    def _running(self, trial: Any, learner: Learner | None) -> Running:
        losses = [loss for _, loss in sorted(trial.intermediate_values.items())]
        train = self.ground.recipe.train
        n_looks = len(learner.look_steps) if learner else max(1, round(train.epochs / train.evaluate_every))
        done = learner.progress.step / learner.total if learner else min(1.0, len(losses) / n_looks)
        return Running(trial.number, trial.params, losses, done, n_looks)

    def ended(self, asked: Asked, fitted: Fitted, facts: dict[str, Any], save: Callable[[Path], None]) -> None:
        """A trial is over, pruned or trained to the end; `save` writes its adapter into a folder."""
        if fitted.stopped == "pruned":
            self.study.prune(asked.number, facts)
            return
        loss = float("nan") if fitted.best_loss is None else fitted.best_loss
        best = self.study.best()
        if math.isfinite(loss) and (best is None or (loss, asked.number) < (best.value, best.number)):
            kept = self.ground.kept(asked.number)
            disk.make_folder(kept.parent)

            def fill(folder: Path) -> None:
                save(folder)
                (folder / FITTED_FILE).write_text(json.dumps(asdict(fitted)), encoding="utf-8")

            disk.write_folder(kept, fill)
        self.study.finish(asked.number, loss, facts)
        self._drop_beaten()

    def _drop_beaten(self) -> None:
        """Of the adapters that lie here only the best one stays, and those that other workers are about to tell of."""
        lying = [path for path in (self.ground.folder / "trials").glob("[0-9]*") if path.name.isdecimal()]
        trials = self.study.trials()  # looked at once, and later than the folders
        best = ledger.best(trials)
        stay = {trial.number for trial in (*ledger.running(trials), *([best] if best else []))}
        for folder in lying:
            if int(folder.name) not in stay:
                disk.remove(folder)

    def _member(self, asked: Asked) -> Member:
        ground, recipe = self.ground, asked.recipe
        name = f"trial-{asked.number}"
        rows = ground.rows.of(recipe)
        adapter = new_adapter(
            ground.base.model,
            recipe.adapter,
            seed=recipe.train.seed,
            token_ids=ground.token_ids(recipe),
            tokenizer=ground.base.tokenizer,
        )
        saved = self._saved(asked)
        for number, loss in enumerate(_losses(saved), start=1):
            self.study.report(asked.number, number, loss)
        held = [(row.input_ids, row.labels) for row in ground.rows.of(ground.recipe).valid]
        learned = training_rows(recipe, ground.base, rows)
        self._asked[name], self._n_steps[name] = asked, count_steps(len(learned), recipe)[1]
        return Member(name, recipe, ground.plan(recipe), learned, held, adapter, saved)

    def _saved(self, asked: Asked) -> Path | None:
        """Where an earlier attempt at this trial was saved, by a process that is gone; None where it cannot be read."""
        if asked.again_of is None:
            return None
        by_number = {trial.number: trial for trial in self.study.trials()}
        number: int | None = asked.again_of
        while number is not None:
            for place in sorted(self.ground.checkpoints.glob("worker-*")):
                found = find_saved(place, f"trial-{number}")
                if found is not None and is_sound(found):
                    target = self.place / f"again-{asked.number}"  # its old place may be swept any time
                    disk.remove(target)
                    disk.make_folder(self.place)
                    disk.copy_folder(found, target)
                    return target
            number = ledger.again_of(by_number[number]) if number in by_number else None
        return None


def facts_of(asked: Asked, fitted: Fitted, n_steps: int, n_parameters: int) -> dict[str, Any]:
    """What is told of a trial beside its loss. n_steps: how many it would have taken to its end."""
    return {
        "kind": asked.recipe.adapter.kind,
        "steps": fitted.steps,
        "steps_planned": n_steps,
        "seconds": round(fitted.seconds, 3),
        "n_tokens": fitted.n_tokens,
        "parameters": n_parameters,
        "memory_mb": round(n_parameters * 4 * 4 / 2**20, 3),  # weights, gradient, two moments in float32
        "best_step": fitted.best_step,
    }


def _losses(saved: Path | None) -> list[float]:
    if saved is None:
        return []
    state = json.loads((saved / STATE_FILE).read_text(encoding="utf-8"))
    return [float(loss) for loss in state["losses"]]


def _in_fresh_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    folder.mkdir()
    fill(folder)
