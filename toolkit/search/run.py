"""A search at work in one process: ask, learn, tell, until the study is over. Any number of processes do the same."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial
from rich.console import Console

from toolkit import disk
from toolkit.errors import AdapterError
from toolkit.fit.fitted import Fitted
from toolkit.fit.many import Setup, fit_many
from toolkit.fit.plan import Plan
from toolkit.fit.prepare import place_here, shape_of, training_rows
from toolkit.fit.stackable import holds, name_of
from toolkit.fit.stops import StopOnSignal
from toolkit.search import ledger
from toolkit.search.crew import FITTED_FILE, Crew, Ground
from toolkit.search.split import limits_of, trials_together
from toolkit.search.study import Study
from toolkit.search.table import SearchTable
from toolkit.search.workers import Worker
from toolkit.stack.adapter import new_adapter
from toolkit.stack.stack import Stack

WORKER = "MALTU_WORKER"  # how a process started by another one is told its index and whose child it is
WORKERS_FILE = ".workers"
LOOK_S = 0.3
STOP_S = 30.0  # how long a helper may take to save and stop


@dataclass(frozen=True)
class Found:
    """What a search came to: its facts for run.json, and the best trial, if its adapter lies in this run folder.

    folder: holds adapter/ (or model/ where everything was trained). where: the worker that has it. history: of every
    trial that ended its number, loss and the numbers that it tried.
    """

    facts: dict[str, Any]
    folder: Path | None
    fitted: Fitted | None
    values: Mapping[str, Any]
    where: str
    history: tuple[tuple[int, dict[str, float]], ...] = ()


@dataclass(frozen=True)
class Part:
    """What a process does in a search. `leads`: whether it writes what the search came to; who only joins leaves that
    to the one that does. meanwhile: done once, when it has nothing to learn and waits for the others.
    """

    n_threads: int
    is_quiet: bool
    leads: bool
    meanwhile: Callable[[], object] = lambda: None


def work(ground: Ground, identity: Mapping[str, Any], console: Console, part: Part) -> Found | None:
    """Take part in the recipe's search until it is over; None: asked to stop, and everything is saved.

    Raises: RunError for a study begun with something else, SearchError for one that cannot be reached, DiskError; the
    same command goes on.
    """
    index, parent = _whose()
    assert ground.recipe.search is not None  # a search was asked for
    disk.make_folder(ground.folder)
    table = SearchTable(console, ground.recipe.search.trials, part.is_quiet)
    worker = Worker.here(index)
    plan = ground.plan(ground.recipe)
    resolved = {"train.learning_rate": plan.learning_rate, "train.max_length": plan.max_length}
    before = torch.get_num_threads()
    torch.set_num_threads(min(part.n_threads, before))  # OMP_NUM_THREADS may allow fewer
    study = Study.open(ground.recipe, ground.folder, worker=worker, identity=identity, resolved=resolved, say=table.say)
    place = ground.checkpoints / f"worker-{worker.name}"
    try:
        with at_work(ground.folder), table, StopOnSignal(table.say) as stops:
            crew = Crew(ground, study, place, table, lambda: stops.is_asked or _is_orphan(parent))
            is_over = _learn(crew, plan, table.say, part.meanwhile)
            if not is_over:
                return None
            crew.show(is_last=True)
        return _found(ground, study) if part.leads else Found({}, None, None, {}, "")
    finally:
        study.leave()
        torch.set_num_threads(before)


def _learn(crew: Crew, plan: Plan, say: Callable[[str], None], meanwhile: Callable[[], object]) -> bool:
    """Until the study is over; False: asked to stop. Where nothing is left to ask, it waits for the others: one of
    them may die, and its trials are asked again.
    """
    stack = _stack(crew, say)
    setup = _setup(crew.ground, plan) if stack is not None else None
    told: set[str] = set()
    is_idle = False
    while True:
        if stack is None or setup is None:
            crew.next()
        elif not fit_many(stack, crew, setup, crew.place):
            return False
        alone, crew.alone = crew.alone, None
        if alone is not None and not crew.wants_stop():
            kind = name_of(alone.recipe)
            if kind not in told and stack is not None:
                say(f"{kind}: no stack holds adapters of this kind, so its trials run one after another.")
                told.add(kind)
            from toolkit.search.alone import fit_alone  # here: trl is slow, and most searches never need it

            if not fit_alone(crew, alone):
                return False
            continue
        if crew.study.is_over():
            return True
        if crew.wants_stop():
            return False
        crew.show()
        if not is_idle:
            is_idle = True
            meanwhile()
        time.sleep(LOOK_S)


def _stack(crew: Crew, say: Callable[[str], None]) -> Stack | None:
    """The stack of this base; None, with a word about it, for a base that no stack takes."""
    try:
        return Stack(crew.ground.base.model, base_hash=crew.ground.base.hash)
    except AdapterError as unfit:
        say(f"No stack takes this base ({unfit}), so trials run one after another.")
        crew.is_stackless = True
        return None


def _setup(ground: Ground, plan: Plan) -> Setup:
    rows = ground.rows.of(ground.recipe)
    place = place_here()
    learned = training_rows(ground.recipe, ground.base, rows)
    longest = max(len(row.input_ids) for row in (*rows.train, *rows.valid))
    limits = limits_of(shape_of(ground.base.model, ground.base.context), place, plan, longest)
    together = trials_together(ground.recipe, place, limits, learned, _member_bytes(ground))
    return Setup(together, limits, ground.base.tokenizer.pad_token_id or 0, plan.precision)


def _member_bytes(ground: Ground) -> int:
    """What one that learns holds beside activations: weights, gradient, two moments, best tensors, in float32."""
    recipe = ground.recipe
    if not holds(recipe):
        return 1
    ids, tokenizer = ground.token_ids(recipe), ground.base.tokenizer
    made = new_adapter(ground.base.model, recipe.adapter, seed=0, token_ids=ids, tokenizer=tokenizer)
    return 5 * 4 * sum(tensor.numel() for tensor in made.tensors.values())


def _found(ground: Ground, study: Study) -> Found:
    from toolkit.search.results import write_results  # here: plots are slow to import, and only the end needs them

    facts = study.reach(lambda: write_results(study.optuna, ground.folder, ground.recipe))
    best = study.best()
    if best is None:
        return Found(facts, None, None, {}, "")
    history = tuple((trial.number, _numbers(trial)) for trial in study.trials() if trial.state.is_finished())
    folder = ground.kept(best.number)
    where, values = str(best.user_attrs.get(ledger.WORKER, "")), facts["best"]["values"]
    if not (folder / FITTED_FILE).exists():
        return Found(facts, None, None, values, where, history)
    fitted = Fitted(**json.loads((folder / FITTED_FILE).read_text(encoding="utf-8")))
    return Found(facts, folder, fitted, values, where, history)


def _numbers(trial: FrozenTrial) -> dict[str, float]:
    losses = trial.intermediate_values.values()
    told = {"search/loss": trial.value if trial.value is not None else min(losses, default=math.nan)}
    told |= {f"search/{name}": value for name, value in trial.params.items()}
    return {
        name: float(value) for name, value in told.items() if isinstance(value, int | float) and math.isfinite(value)
    }


# Processes


class Others:
    """Worker processes of this machine that were started beside this one: they join the run as anybody might."""

    def __init__(self, command: Sequence[str], folder: Path, count: int, n_threads: int) -> None:
        self._started: list[tuple[Path, subprocess.Popen[bytes]]] = []
        try:
            for index in range(1, count + 1):
                self._started.append((folder / f"worker-{index}.log", _start(command, folder, index, n_threads)))
        except OSError as failed:
            self.stop()
            raise disk.cannot_write(folder / "worker.log", failed) from failed

    def stop(self) -> list[str]:
        """Ask them to save and stop, and wait for them, half a minute at most; what those say that ended badly."""
        for _, process in self._started:
            if process.poll() is None:
                process.terminate()
        said = []
        for log, process in self._started:
            code = 0
            try:
                code = process.wait(STOP_S)
            except subprocess.TimeoutExpired:  # it waits for a storage that is away
                process.kill()
                process.wait()
            if code not in (0, 130, -15):
                tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or [""]
                said.append(f"A worker ended with code {code}: {tail[0]} ({log})")
            else:
                disk.remove(log)
        self._started = []
        return said


@contextlib.contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """While any process is inside, `is_at_work` says so; a killed one is not inside any more."""
    with (folder / WORKERS_FILE).open("a+", encoding="utf-8") as file:
        if os.name != "nt":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def is_at_work(folder: Path) -> bool:
    """Whether some process works on the search in this folder."""
    if os.name == "nt" or not (folder / WORKERS_FILE).exists():
        return False
    import fcntl

    with (folder / WORKERS_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _start(command: Sequence[str], folder: Path, index: int, n_threads: int) -> "subprocess.Popen[bytes]":
    told = {**os.environ, WORKER: f"{index} {os.getpid()}", "OMP_NUM_THREADS": str(n_threads)}
    with (folder / f"worker-{index}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "toolkit.train", *command],
            env=told,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the one that leads, which asks its helpers to stop
        )


def _whose() -> tuple[int, int | None]:
    """This worker's index, and the process that started it to help."""
    told = os.environ.get(WORKER, "").split()
    return (int(told[0]), int(told[1])) if len(told) == 2 else (0, None)


def is_helper() -> bool:
    """Whether this process was started by a search to help it."""
    return _whose()[1] is not None


def _is_orphan(parent: int | None) -> bool:
    return parent is not None and os.getppid() != parent
