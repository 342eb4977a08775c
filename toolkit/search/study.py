"""A study: workers ask it what to try and tell it what came of it; it remembers, and gives nothing out twice.

Any number of processes may hold the same study open, on one machine or many. None of them is in charge: what counts
follows from the trials alone (ledger.py), so a worker may be killed at any moment without loss.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from toolkit.errors import RecipeError
from toolkit.recipe.model import Recipe
from toolkit.recipe.search import Search
from toolkit.search import ledger
from toolkit.search.identity import kept, refuse_changed, refuse_foreign
from toolkit.search.ledger import AGAIN_OF, FIXED, LEFT, LOST, MOST_ATTEMPTS, OWN, REASON, TWICE, WORKER
from toolkit.search.samplers import may_repeat, pruner, seen_by
from toolkit.search.space import own_values, suggest, walk
from toolkit.search.storage import Clock, Storage, open_storage
from toolkit.search.workers import Watch, Worker

T = TypeVar("T")
LOOK_S = 5.0  # between two looks for trials of dead workers
BEAT_S = 15.0  # between two signs of life
IDENTITY, OF_WORKER = "identity", "worker:"  # user attributes of the study
CLOCK = Clock()


@dataclass(frozen=True)
class Asked:
    """One trial to try. again_of: the lost trial that it repeats. values: what that one had reported, by evaluation."""

    number: int
    recipe: Recipe
    params: dict[str, Any]
    again_of: int | None
    values: dict[int, float]


class Study:
    """One worker's hold on a study; for one thread. `optuna` is the study underneath.

    Every call may raise DiskError (nothing that was told is lost, and the call may be made again) and, when a storage
    stays away for ten minutes or is damaged, SearchError. Call `beat` at least every 20 seconds and `leave` at the end.
    """

    def __init__(self, recipe: Recipe, storage: Storage, worker: Worker, own: dict[str, Any] | None) -> None:
        search = recipe.search
        if search is None:
            raise ValueError("a study needs a recipe with a search section")
        self.worker, self._recipe, self._search, self._own = worker, recipe, search, own
        self._storage, self._kept, self._clock = storage, storage.optuna, storage.clock
        self._grid = walk(recipe) if search.sampler == "grid" else []
        self.budget = min(search.trials, len(self._grid)) if self._grid else search.trials
        self._watch = Watch(worker, self._clock.now)
        self._handed: set[int] = set()  # numbers that `ask` gave out
        self._taken: set[int] = set()  # of these, those that others took for lost
        self._judged: dict[tuple[int, int], bool] = {}
        self._lost: list[int] = []  # found, and not yet told by `beat`
        self._opened, self._n_beats = self._clock.wall(), 0
        self._beaten = self._looked = -math.inf
        self.optuna = storage.reach(self._join)
        self._id = self._kept.get_study_id_from_name(recipe.name)

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        folder: Path,
        *,
        worker: Worker,
        identity: Mapping[str, Any],
        resolved: Mapping[str, Any],
        say: Callable[[str], None],
        clock: Clock = CLOCK,
    ) -> "Study":
        """Begin the recipe's study, or join it where it is under way.

        `folder` exists; the journal lies there when the recipe names no storage. `identity` is what the study is begun
        with, as `inputs_of` gives it. `resolved` says what `auto` is, by dotted key. `say` is told what the user should
        know. Raises RunError when the study was begun with another identity, SearchError when its storage is down.
        """
        search: Search | None = recipe.search
        storage = open_storage(search.storage if search is not None else None, folder, say, clock)
        try:
            own = own_values(recipe, resolved)
            if own is None:
                say("The recipe's own values lie outside its space, so no trial tries them.")
            study = cls(recipe, storage, worker, own)
            storage.reach(lambda: study._agree(kept(identity)))
            storage.reach(study._beat)
        except BaseException:
            storage.close()
            raise
        return study

    def _join(self) -> optuna.study.Study:
        return optuna.create_study(
            study_name=self._recipe.name,
            storage=self._kept,
            sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=pruner(self._recipe),
            load_if_exists=True,
        )

    def _agree(self, identity: dict[str, Any]) -> None:
        begun = self.optuna.user_attrs.get(IDENTITY)
        if begun is None:
            refuse_foreign(self._recipe, self._storage.place, len(self._all()))
            self.optuna.set_user_attr(IDENTITY, identity)
            begun = self.optuna.user_attrs[IDENTITY]
        refuse_changed(self._recipe, self._storage.place, begun, identity)

    def ask(self) -> Asked | None:
        """The next trial, which this worker now has to try; None when there is none to give out.

        None means: the budget is given out (trials of living workers count, lost ones are asked again), the minutes are
        over, or nothing got better for too long. It may change while others run: see `is_over`.
        """
        self._storage.reach(self._find_lost)
        while True:
            trials = self._storage.reach(self._all)
            wanted = self._wanted(trials)
            if wanted is None:
                return None
            asked = self._take(*wanted)
            if asked is not None:
                return asked

    def _wanted(self, trials: list[FrozenTrial]) -> tuple[dict[str, Any], Mapping[str, Any] | None] | None:
        """User attributes of the trial to make next, and its values where they are given; None for no trial."""
        if self._is_stopped(trials):
            return None
        for lost in ledger.to_ask_again(trials):
            return {AGAIN_OF: lost.number}, ledger.values_of(lost, trials) or None
        counted = ledger.originals(trials)
        if len(counted) >= self.budget:
            return None
        if self._own is not None and not any(trial.user_attrs.get(OWN) for trial in counted):
            return {OWN: True}, self._own
        if self._grid:
            known = {ledger.point(ledger.given(trial) or trial.params) for trial in counted}
            free = next((values for values in self._grid if ledger.point(values) not in known), None)
            return None if free is None else ({}, free)
        return {}, None

    def _take(self, attributes: dict[str, Any], values: Mapping[str, Any] | None) -> Asked | None:
        """Make a trial and propose its values; None when another worker was quicker, or the values do not go together.

        The trial is made with its worker's name in it, in one write: it never stands there without an owner.
        """
        number = self._make(attributes, values)
        trials = self._storage.reach(self._all)
        trial = trials[number]
        if not ledger.stands(trial, trials, self.budget):
            self._storage.reach(lambda: self._mark(number, TWICE))
            return None
        try:
            recipe, params = self._storage.reach(lambda: self._propose(number))
        except RecipeError as refused:
            self._handed.add(number)
            self.fail(number, str(refused), {})
            return None
        if self._search.sampler == "qmc" and values is None and self._is_repeated(number, params, trials):
            self._storage.reach(lambda: self._mark(number, TWICE))
            return None
        self._handed.add(number)
        return Asked(number, recipe, params, ledger.again_of(trial), ledger.reported(trial, trials))

    def _make(self, attributes: dict[str, Any], values: Mapping[str, Any] | None) -> int:
        template = create_trial(
            state=TrialState.RUNNING,
            user_attrs={WORKER: self.worker.name, **attributes},
            system_attrs={} if values is None else {FIXED: dict(values)},
        )
        is_again = False

        def make() -> int:
            nonlocal is_again
            made = self._strays(self._all()) if is_again else []  # it may be there, and only the answer got lost
            is_again = True
            if made:
                return made[-1].number
            return self._kept.get_trial(self._kept.create_new_trial(self._id, template_trial=template)).number

        return self._storage.reach(make)

    def _propose(self, number: int) -> tuple[Recipe, dict[str, Any]]:
        seen = seen_by(number, self._recipe.name, self._kept, self._recipe)
        trial = optuna.trial.Trial(seen, self._trial_id(number))
        recipe = suggest(trial, self._recipe)
        return recipe, trial.params

    def _is_repeated(self, number: int, params: Mapping[str, Any], trials: list[FrozenTrial]) -> bool:
        """Whether two workers read the same number off the sequence of points at once."""
        before = [trial for trial in ledger.originals(trials) if trial.number < number]
        point = ledger.point(params)
        return not may_repeat(self._recipe) and any(ledger.point(trial.params) == point for trial in before)

    def report(self, number: int, step: int, loss: float) -> None:
        """Tell the held-out loss of a trial's evaluation; evaluations count from 1."""
        self._tell(number, lambda trial_id: self._kept.set_trial_intermediate_value(trial_id, step, float(loss)))

    def should_prune(self, number: int) -> bool:
        """Whether the trial, by what it last reported, is not worth going on with; or was taken for lost by others."""
        pruned: list[bool] = []

        def judge(trial_id: int) -> None:
            trial = self._kept.get_trial(trial_id)
            if trial.state != TrialState.RUNNING:
                raise UpdateFinishedTrialError
            place = number, trial.last_step or 0
            if place not in self._judged:  # a pruner that is asked twice says something else
                self._judged[place] = self.optuna.pruner.prune(self.optuna, trial)
            pruned.append(self._judged[place])

        self._tell(number, judge)
        return number in self._taken or pruned[-1]

    def prune(self, number: int, facts: Mapping[str, Any]) -> None:
        """Tell that a trial was ended early; its last report stands for it."""
        self._end(number, TrialState.PRUNED, None, facts)

    def finish(self, number: int, loss: float, facts: Mapping[str, Any]) -> None:
        """Tell what a trial that was trained to the end came to. A loss that is not finite is a failure."""
        if math.isfinite(loss):
            self._end(number, TrialState.COMPLETE, float(loss), facts)
        else:
            self.fail(number, f"its loss is {loss}", facts)

    def fail(self, number: int, reason: str, facts: Mapping[str, Any]) -> None:
        """Tell that a trial came to nothing, and why. It counts, and is not asked again."""
        self._end(number, TrialState.FAIL, None, {**facts, REASON: reason})

    def _end(self, number: int, state: TrialState, loss: float | None, facts: Mapping[str, Any]) -> None:
        def end(trial_id: int) -> None:
            for name, value in facts.items():
                self._kept.set_trial_user_attr(trial_id, name, value)
            self._close(number, state, loss)

        def is_told() -> bool:
            trial = self._kept.get_trial(self._trial_id(number))
            return trial.state == state and trial.user_attrs.get(REASON) == facts.get(REASON)

        self._tell(number, end, is_told)

    def _close(self, number: int, state: TrialState, loss: float | None = None) -> None:
        """Raises UpdateFinishedTrialError where the trial has ended already."""
        try:
            self.optuna.tell(number, loss, state=state)
        except ValueError:
            if self._all()[number].state == TrialState.RUNNING:
                raise
            raise UpdateFinishedTrialError from None

    def _tell(self, number: int, tell: Callable[[int], None], is_told: Callable[[], bool] = lambda: False) -> None:
        """Write something about a trial of ours, unless others ended it; `is_told`: whether we did so ourselves."""
        if number in self._taken:
            return
        try:
            self._storage.reach(lambda: tell(self._trial_id(number)))
        except UpdateFinishedTrialError:
            if not self._storage.reach(is_told):
                self._taken.add(number)
                self._storage.say(
                    f"Trial {number} was taken for lost while this process did not answer, and is tried elsewhere."
                    " What it came to here does not count."
                )

    def beat(self) -> list[int]:
        """Say that this worker lives, and see to the trials of those that do not: they are failed and asked again.

        Returns the numbers of the trials found lost since the last call. Cheap: it looks every few seconds at most, and
        waits for no storage.
        """
        now = self._clock.now()
        if now - self._looked >= LOOK_S:
            self._looked = now
            if now - self._beaten >= BEAT_S:
                self._storage.reach_now(self._beat)
            self._storage.reach_now(self._find_lost)
        found, self._lost = self._lost, []
        return found

    def _beat(self, has_left: bool = False) -> None:
        self._n_beats += 1
        facts = {"opened": self._opened, "at": self._clock.wall(), "beat": self._n_beats, "left": has_left}
        self.optuna.set_user_attr(f"{OF_WORKER}{self.worker.name}", {**self.worker.facts(), **facts})
        self._beaten = self._clock.now()

    def _find_lost(self) -> None:
        trials = self._all()
        for stray in self._strays(trials):
            self._mark(stray.number, TWICE)
        workers = self._workers()
        dead = self._watch.dead(workers)
        for trial in ledger.running(trials):
            owner = trial.user_attrs[WORKER]
            if owner not in dead:
                continue
            has_left = any(of.get("left") for of in workers.values() if of.get("name") == owner)
            deaths = [one for one in ledger.chain(trial, trials) if one.user_attrs.get(REASON) != LEFT]
            if not ledger.stands(trial, trials, self.budget):
                self._mark(trial.number, TWICE)
            elif not has_left and len(deaths) >= MOST_ATTEMPTS:
                self._mark(trial.number, f"its process died {MOST_ATTEMPTS} times")
            elif self._mark(trial.number, LEFT if has_left else LOST):
                self._lost.append(trial.number)
                told = "was under way when its process stopped" if has_left else f"was lost with its process ({owner})"
                self._storage.say(f"Trial {trial.number} {told}; it goes on under a new number.")

    def _strays(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Trials that were made for this worker and never given out, because something failed in between."""
        own = [trial for trial in ledger.running(trials) if trial.user_attrs[WORKER] == self.worker.name]
        return [trial for trial in own if trial.number not in self._handed]

    def _mark(self, number: int, reason: str) -> bool:
        """Fail a trial; False where it has ended meanwhile."""
        try:
            self._kept.set_trial_user_attr(self._trial_id(number), REASON, reason)
            self._close(number, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False
        return True

    def is_over(self) -> bool:
        """Whether nothing runs and nothing is left to try: the budget is used up, or minutes or patience ended it."""
        trials = self._storage.reach(self._all)
        if ledger.running(trials):
            return False
        is_used_up = len(ledger.originals(trials)) >= self.budget and not ledger.to_ask_again(trials)
        return is_used_up or self._is_stopped(trials)

    def _is_stopped(self, trials: list[FrozenTrial]) -> bool:
        patience, left = self._search.patience, self.seconds_left()
        return (left is not None and left <= 0) or (patience is not None and ledger.is_stale(trials, patience))

    def seconds_left(self) -> float | None:
        """What is left of the search's minutes, in which at least one worker was there; None without a limit."""
        return self._storage.reach(self._left)

    def _left(self) -> float | None:
        if self._search.minutes is None:
            return None
        told = self._workers()
        spans = [(facts["opened"], facts["at"]) for name, facts in told.items() if name != self.worker.name]
        return 60 * self._search.minutes - ledger.time_used_s([*spans, (self._opened, self._clock.wall())])

    def trials(self) -> list[FrozenTrial]:
        """Every trial that was tried, by number: without those that another worker was quicker to take."""
        return _tried(self._storage.reach(self._all))

    def glance(self) -> tuple[list[FrozenTrial], float | None] | None:
        """The trials and what is left of the minutes, for one who looks on; None where the storage is away."""
        return self._storage.reach_now(lambda: (_tried(self._all()), self._left()))

    def best(self) -> FrozenTrial | None:
        """The trial that was trained to the end with the lowest loss, or None."""
        return ledger.best(self._storage.reach(self._all))

    def reach(self, call: Callable[[], T]) -> T:
        """Something else that is read from the study, with the same patience. Raises SearchError."""
        return self._storage.reach(call)

    def leave(self) -> None:
        """Tell that this worker goes, so that nobody waits for it: what it did not end is asked again elsewhere."""
        self._storage.reach_now(lambda: self._beat(has_left=True))
        self._storage.close()

    def _all(self) -> list[FrozenTrial]:
        return self._kept.get_all_trials(self._id, deepcopy=False)

    def _workers(self) -> dict[str, dict[str, Any]]:
        attributes = self._kept.get_study_user_attrs(self._id)
        return {facts["name"]: facts for name, facts in attributes.items() if name.startswith(OF_WORKER)}

    def _trial_id(self, number: int) -> int:
        return self._kept.get_trial_id_from_study_id_trial_number(self._id, number)


def _tried(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if not ledger.is_void(trial)]
