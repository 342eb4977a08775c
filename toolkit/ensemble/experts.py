"""Several adapters, each from its own recipe and rows: side by side in a stack, what no stack holds one after another.

Whoever is done lies at once in adapters/NAME of the run, with how it went in checkpoints/fitted/NAME.json. A run that
goes on skips those and takes up the others where the last checkpoint left them. It ends with the same bits: whoever was
done after that checkpoint learns from there once more beside the others, because a sum's rounding follows the rows that
stand beside.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from toolkit import disk
from toolkit.bases.load import LoadedBase
from toolkit.bundle import Run
from toolkit.errors import AdapterError, DataError, RecipeError, TrainingError
from toolkit.fit.batches import Row
from toolkit.fit.fitted import Fitted
from toolkit.fit.many import Look, Setup, find_saved, fit_many
from toolkit.fit.member import Learner, Member, is_sound, saved_step
from toolkit.fit.plan import Plan, count_steps
from toolkit.fit.prepare import place_here, shape_of
from toolkit.fit.stackable import holds, name_of
from toolkit.recipe.model import Recipe
from toolkit.score import supervised_log_likelihoods
from toolkit.search.split import fill, limits_of
from toolkit.stack.adapter import Adapter, new_adapter, write_adapter
from toolkit.stack.stack import Stack

REFUSALS = (AdapterError, DataError, RecipeError)  # a recipe that does not do for one; the others go on
IN_A_STACK = ("fp32", "bf16")  # precisions that a stack trains in
COPIES = 5  # weights, gradient, two moments, best tensors, in float32
PLAN_FILE = "plan.json"
SETTLED_FILE = "settled.json"  # under checkpoints/: who never learns beside another again
AFTER = "after"  # in the file of one that is done: the stack's last checkpoint before


@dataclass(frozen=True)
class Task:
    """What one adapter is to learn.

    name: of its folder. recipe: its own. rows: of one epoch, as often as weights of files say; valid: what it is
    measured on, empty: never. token_ids: those of its training rows, for kind embedding (None: every token).
    """

    name: str
    recipe: Recipe
    rows: Sequence[Row]
    valid: Sequence[Row]
    token_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Seen:
    """How one stands after a step. valid: its last held-out loss; n_tokens: seen so far."""

    name: str
    step: int
    total: int
    loss: float
    valid: float | None
    n_tokens: int


@dataclass(frozen=True)
class Hooks:
    """What training asks and tells on its way: a line, whether to save and stop, and every step of all at once.

    begun: a member learns from this step on; what was told of it beyond did not last. looked: its held-out loss after a
    step, told before that step. gate_begun, gate: the same of a gate; its `loss` and `valid_loss`.
    """

    say: Callable[[str], None] = lambda line: None
    wants_stop: Callable[[], bool] = lambda: False
    watch: Callable[[Sequence[Seen]], None] = lambda seen: None
    begun: Callable[[str, int], None] = lambda name, step: None
    looked: Callable[[str, int, float], None] = lambda name, step, loss: None
    gate_begun: Callable[[int], None] = lambda step: None
    gate: Callable[[str, int, float], None] = lambda name, step, value: None


def fit_members(
    tasks: Sequence[Task],
    base: LoadedBase,
    run: Run,
    *,
    plan_of: Callable[[Recipe, Sequence[Row]], Plan],
    side_by_side: int | None = None,
    hooks: Hooks = Hooks(),
) -> dict[str, Fitted] | None:
    """Train every task that is not done yet and write its adapter; how each went, in their order. None: asked to stop.

    plan_of: the plan of a recipe with its training rows. side_by_side: how many learn at once; None: as many as fill a
    forward pass and find room. A task whose training fails leaves no adapter, and the others go on.
    Raises: TrainingError in the end, with every task that failed and why; DiskError; ValueError for a name twice. The
    same call goes on. Cost: as fit_many; what no stack holds costs as fit_one and loads the base once more each.
    """
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError("a name stands twice among the tasks")
    crew = _Crew({task.name: task for task in tasks}, base, run, plan_of, hooks)
    crew.open = _open(tasks, crew)
    if not (_in_stacks(crew, side_by_side) and _alone(crew)):
        return None
    if crew.failures:
        raise TrainingError(_told(crew.failures))
    found = {task.name: read_fitted(run, task.name) for task in tasks}
    return {name: fitted for name, fitted in found.items() if fitted is not None}


def read_fitted(run: Run, name: str) -> Fitted | None:
    """How a member's training went, when it is over and its adapter is there; None else."""
    try:
        told = json.loads(_fitted_file(run, name).read_text(encoding="utf-8"))
        fitted = Fitted(**{key: value for key, value in told.items() if key != AFTER})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return fitted if run.adapter(name).is_dir() else None


def _open(tasks: Sequence[Task], crew: "_Crew") -> list[Task]:
    """Those that are not done, and those that were done after the last checkpoint of a stack that was never done."""
    done = [task for task in tasks if read_fitted(crew.run, task.name) is not None]
    settled, last = _settled(crew.run), crew.last_checkpoint()
    again = [task for task in done if task.name not in settled and _after(crew.run, task.name) == last]
    return [task for task in tasks if task not in done or task in again]


def _settled(run: Run) -> frozenset[str]:
    file = run.checkpoints / SETTLED_FILE
    return frozenset(json.loads(file.read_text(encoding="utf-8"))["names"]) if file.exists() else frozenset()


def _after(run: Run, name: str) -> str | None:
    """The checkpoint after which one was done, "" before the first; None: no other has to go on from there."""
    told = json.loads(_fitted_file(run, name).read_text(encoding="utf-8"))
    return None if told.get(AFTER) is None else str(told[AFTER])


def together(tasks: Sequence[Task], n_tokens: int, free_bytes: float, member_bytes: int, device: str) -> int:
    """How many tasks learn at once: as many as fill a forward pass of `n_tokens` and find room, `member_bytes` each."""
    each = [task.recipe.train.batch_size * sum(len(ids) for ids, _ in task.rows) / len(task.rows) for task in tasks]
    return min(len(tasks), fill(sum(each) / len(each), device, n_tokens, free_bytes / member_bytes))


class _Crew:
    """Keeps the promises of toolkit.fit.many.Crew for tasks that are known from the start."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        base: LoadedBase,
        run: Run,
        plan_of: Callable[[Recipe, Sequence[Row]], Plan],
        hooks: Hooks,
    ) -> None:
        self.tasks, self.base, self.run, self.plan_of, self.hooks = tasks, base, run, plan_of, hooks
        self.open: list[Task] = []  # to be trained still
        self.coming: list[tuple[Task, Plan]] = []  # of those the ones that the present stack is to train
        self.failures: dict[str, str] = {}
        self.place = run.checkpoints / "stack"
        self._valid: dict[str, float] = {}
        self._gone: dict[str, Fitted] = {}  # in the step that is not told yet

    # What fit_many asks

    def next(self) -> Member | None:
        """The next task."""
        while self.coming and not self.hooks.wants_stop():
            task, plan = self.coming.pop(0)
            try:
                return self._member(task, plan)
            except REFUSALS as refused:
                self.fail(task.name, str(refused))
        return None

    def looked(self, looks: Sequence[Look]) -> Collection[str]:
        """Nobody leaves for what the others have."""
        for look in looks:
            self._valid[look.name] = look.loss
            self.hooks.looked(look.name, look.step, look.loss)
        return ()

    def left(self, name: str, fitted: Fitted, adapter: Adapter) -> None:
        """Write the adapter."""
        base, self._gone[name] = self.base, fitted
        self.keep(
            name,
            fitted,
            lambda folder: write_adapter(adapter, folder, base.model, base=base.source, base_hash=base.hash),
            self.last_checkpoint(),
        )

    def failed(self, name: str, fitted: Fitted, reason: str) -> None:
        """Remember why."""
        del fitted
        self.fail(name, reason)

    def alive(self) -> None:
        """Nobody waits for a sign of life."""

    def stepped(self, learners: Sequence[Learner], losses: Mapping[str, float]) -> bool:
        """Tell how everybody stands; whether somebody wants to stop."""
        stands = {one.name: (one.progress.step, one.progress.n_tokens) for one in learners}
        stands |= {name: (fitted.steps, fitted.n_tokens) for name, fitted in self._gone.items()}
        self._gone.clear()
        self.hooks.watch([self._seen(name, loss, *stands[name]) for name, loss in losses.items() if name in stands])
        return self.hooks.wants_stop()

    # What becomes of a task

    def keep(self, name: str, fitted: Fitted, fill: Callable[[Path], None], after: str | None) -> None:
        """Its adapter lies in the run before it counts as done."""
        folder, file = self.run.adapter(name), _fitted_file(self.run, name)
        disk.make_folder(folder.parent)
        disk.write_folder(folder, fill)
        disk.make_folder(file.parent)
        disk.write_json(file, {**asdict(fitted), AFTER: after})

    def settle(self) -> None:
        """A stack is empty: nobody who is done is ever to learn beside another again. All of them at once: a part of
        them, learning once more after a kill, would lack its neighbours.
        """
        done = {name for name in self.tasks if read_fitted(self.run, name) is not None}
        disk.make_folder(self.run.checkpoints)
        disk.write_json(self.run.checkpoints / SETTLED_FILE, {"names": sorted(done | _settled(self.run))})
        disk.remove(self.place)

    def last_checkpoint(self) -> str:
        """The name of the stack's last whole checkpoint; "" before the first."""
        whole = [path.name for path in sorted(self.place.glob("stack-*")) if disk.is_whole(path)]
        return whole[-1] if whole else ""

    def fail(self, name: str, reason: str) -> None:
        """It has no adapter; what an earlier call left goes too."""
        disk.remove(self.run.adapter(name))
        self.failures[name] = reason
        self.hooks.say(f"{name}: {reason}")

    def _seen(self, name: str, loss: float, step: int, n_tokens: int) -> Seen:
        task = self.tasks[name]
        return Seen(name, step, count_steps(len(task.rows), task.recipe)[1], loss, self._valid.get(name), n_tokens)

    def _member(self, task: Task, plan: Plan) -> Member:
        saved = find_saved(self.place, task.name)
        if saved is not None and not is_sound(saved):
            self.hooks.say(f"{task.name}: its checkpoint cannot be read, so it starts anew.")
            saved = None
        self.hooks.begun(task.name, 0 if saved is None else saved_step(saved))
        return Member(task.name, task.recipe, plan, task.rows, task.valid, new_of(task, self.base), saved)


def new_of(task: Task, base: LoadedBase) -> Adapter:
    """The adapter that a task starts with. Raises: AdapterError where it does not fit the base."""
    return new_adapter(
        base.model,
        task.recipe.adapter,
        seed=task.recipe.train.seed,
        token_ids=task.token_ids,
        tokenizer=base.tokenizer,
    )


def _in_stacks(crew: _Crew, side_by_side: int | None) -> bool:
    """Train what a stack holds, one stack for each precision; False: asked to stop."""
    wanted = [task for task in crew.open if holds(task.recipe)]
    if not wanted:
        return True
    try:
        stack = Stack(crew.base.model, base_hash=crew.base.hash)
    except AdapterError as unfit:
        crew.hooks.say(f"No stack takes this base ({unfit}), so its adapters train one after another.")
        return True
    try:
        planned = [(task, crew.plan_of(task.recipe, task.rows)) for task in wanted]
        for precision in IN_A_STACK:
            crew.coming = [(task, plan) for task, plan in planned if plan.precision == precision]
            done = [task for task, _ in crew.coming]
            if not done:
                continue
            if not fit_many(stack, crew, _setup(crew, side_by_side), crew.place):
                return False
            crew.settle()
            if crew.hooks.wants_stop():
                return False
            crew.open = [task for task in crew.open if task not in done]
    finally:
        stack.close()
    return True


def _setup(crew: _Crew, side_by_side: int | None) -> Setup:
    """How many of those that come learn at once, and what a forward pass of theirs holds."""
    base, place, plan = crew.base, place_here(), crew.coming[0][1]
    tasks = [task for task, _ in crew.coming]
    longest = max(len(ids) for task in tasks for ids, _ in (*task.rows, *task.valid))
    limits = limits_of(shape_of(base.model, base.context), place, plan, longest)
    if side_by_side is None:
        size = max(_n_numbers(task, base) for task in _unlike(tasks))
        side_by_side = together(tasks, limits.n_tokens, place.free_bytes, COPIES * 4 * size, place.device)
    return Setup(side_by_side, limits, base.tokenizer.pad_token_id or 0, plan.precision)


def _unlike(tasks: Sequence[Task]) -> list[Task]:
    """Of tasks with the same adapter section the first; an embedding depends on the talk too."""
    kept: list[Task] = []
    for task in tasks:
        is_own = task.recipe.adapter.kind == "embedding"
        if is_own or all(task.recipe.adapter != other.recipe.adapter for other in kept):
            kept.append(task)
    return kept


def _n_numbers(task: Task, base: LoadedBase) -> int:
    try:
        return max(1, sum(tensor.numel() for tensor in new_of(task, base).tensors.values()))
    except REFUSALS:
        return 1  # told when its turn comes


# What no stack holds


def _alone(crew: _Crew) -> bool:
    """Train the rest, one after another; False: asked to stop."""
    if not crew.open:
        return True
    kinds = ", ".join(dict.fromkeys(f"{task.name} ({name_of(task.recipe)})" for task in crew.open))
    crew.hooks.say(f"No stack trains {kinds}; one after another, each on a base of its own.")
    for task in list(crew.open):
        if crew.hooks.wants_stop():
            return False
        try:
            if not _one_alone(crew, task):
                return False
        except (*REFUSALS, TrainingError) as failed:
            crew.fail(task.name, str(failed))
    return True


def _one_alone(crew: _Crew, task: Task) -> bool:
    from toolkit.fit.alone import Lesson, Silent, fit_worn, wear  # here: trl is slow, and most crews never need it
    from toolkit.fit.memory import find_micro_batch

    place = Run(crew.run.checkpoints / "alone" / task.name)
    disk.make_folder(place.path)
    worn = wear(task.recipe, crew.base.device, task.token_ids)
    file = place.path / PLAN_FILE
    if file.exists():  # a run that goes on takes the same steps
        plan = Plan(**json.loads(file.read_text(encoding="utf-8")))
    else:
        pad = worn.base.tokenizer.pad_token_id or 0
        plan = find_micro_batch(worn.model, task.rows, crew.plan_of(task.recipe, task.rows), pad, crew.base.device)
        disk.write_json(file, plan.facts())
    lesson = Lesson(task.recipe, plan, task.rows, (lambda model: mean_loss(model, task.valid)) if task.valid else None)
    held: dict[str, float] = {}
    last = place.last_checkpoint()
    crew.hooks.begun(task.name, int(last.name.removeprefix("step-")) if last else 0)

    def looked(step: int, loss: float) -> None:
        held["loss"] = loss
        crew.hooks.looked(task.name, step, loss)

    def heard(step: int, loss: float, n_tokens: int) -> None:
        crew.hooks.watch([Seen(task.name, step, lesson.n_steps, loss, held.get("loss"), n_tokens)])

    silent = Silent(lesson.n_steps, crew.hooks.say, crew.hooks.wants_stop, heard, looked)
    fitted = fit_worn(worn, lesson, place, silent)
    if fitted.stopped == "asked":
        return False
    crew.keep(task.name, fitted, worn.save, None)
    disk.remove(place.path)
    return True


def mean_loss(model: nn.Module, rows: Sequence[Row]) -> float:
    """Nats per supervised token over these rows."""
    values = [value for row in supervised_log_likelihoods(model, rows) for value in row]
    return -sum(values) / len(values)


def _fitted_file(run: Run, name: str) -> Path:
    return run.checkpoints / "fitted" / f"{name}.json"


def _told(failures: Mapping[str, str]) -> str:
    n = len(failures)
    lines = "".join(f"\n  {name}: {reason}" for name, reason in failures.items())
    return (
        f"{n} adapter{'s' * (n > 1)} could not be trained; the others are done and kept.{lines}\nChange what is said"
        " there for that expert, or leave it out, and run again with another name=…, or with --fresh."
    )
