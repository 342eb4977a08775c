"""A search in order: read this file to know what the command does with a recipe that has a `search`.

The process that holds the run folder's lock leads: it begins the run, starts helpers on a CPU, and writes the result.
Another process with the same command finds the lock held and joins as one more worker. All do the same work in between
(search/run.py); whoever is there when the study is over and holds the best adapter writes the result.
"""

import contextlib
import importlib
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from toolkit import bundle, disk
from toolkit.adapters.kinds import kind_in_folder
from toolkit.bases.fetch import find_folder
from toolkit.bases.files import weight_files
from toolkit.bases.load import LoadedBase, load_base
from toolkit.bundle import Run
from toolkit.card import show_result
from toolkit.errors import BusyError, RunError
from toolkit.fit.cached import CachedRows
from toolkit.fit.inputs import inputs_of, refuse_changed
from toolkit.fit.prepare import make_renderer, place_here, weight_dtype
from toolkit.judge import Judge, tracked_numbers
from toolkit.loaded import WHOLE_MODEL
from toolkit.quiet import quiet
from toolkit.recipe.model import Base, Recipe
from toolkit.recipe.show import to_yaml, without_secrets
from toolkit.recipe.space import without_password
from toolkit.search.crew import Ground
from toolkit.search.identity import kept
from toolkit.search.run import Found, Others, Part, is_at_work, is_helper, work
from toolkit.search.split import Split, count_cores, split_machine
from toolkit.search.words import search_markdown
from toolkit.steps import (
    INTERRUPTED,
    Options,
    begin,
    command_line,
    data_facts,
    facts_of_begun,
    finish,
    in_short,
    make_judge,
    show_finished,
)
from toolkit.track import config_of, open_track, sample_cells

JOIN_S = 120.0  # how long a worker waits for the leader to begin
LOOK_S = 0.2
BUDGET = ("trials", "minutes", "patience")


def run(recipe: Recipe, options: Options) -> int:
    """Search as the recipe says into RUNS/NAME, go on where it stopped, or join a search that runs. Returns the exit
    code.

    Raises MaltuError for everything the user can do something about; the same command goes on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("A search is not started by torchrun. Start the same command once more for each worker.")
    console = Console(quiet=options.quiet)
    folder = Run(options.runs / recipe.name)
    inputs = inputs_of(without_secrets(recipe))
    folder.refuse_foreign()
    with quiet():
        while True:
            try:
                with folder.locked():
                    if is_helper():
                        return 0  # whoever started this process is gone, or done
                    return _lead(recipe, options, folder, inputs, console)
            except BusyError:
                if options.fresh:
                    raise
                code = _join(recipe, options, folder, inputs, console)
                if code is not None:
                    return code


def _lead(recipe: Recipe, options: Options, folder: Run, inputs: dict[str, Any], console: Console) -> int:
    if options.fresh and folder.path.exists() and (folder.path / bundle.RUN_FILE).exists():
        _refuse_fresh(recipe, folder)
        _ground(recipe, folder, inputs)  # a mistake in data or base leaves the old run in its place
        console.print(f"The old run lies in {bundle.set_aside(folder)} now.")
        return run(recipe, Options(options.runs, False, options.quiet, options.command))
    if _is_finished(folder, inputs):
        bundle.drop_checkpoints(folder, ())
        show_finished(folder, console)
        return 0
    split = _split(recipe)
    others = _helpers(options, folder, split)
    try:
        ground = _ground(recipe, folder, inputs)
        rows = ground.rows.of(recipe)
        console.print(in_short(recipe, ground.base, ground.rows.corpus, rows), highlight=False)
        _begin(recipe, options, folder, inputs, ground)
        part = Part(split.threads, options.quiet, leads=True, meanwhile=lambda: _prepare_result(recipe, ground))
        found = work(ground, inputs, console, part)
        if found is None:
            console.print("Stopped. The same command goes on where it stopped.")
            return INTERRUPTED
        for said in others.stop() if others is not None else ():  # the study is over
            console.print(said, highlight=False, markup=False)
        return _result(recipe, folder, ground, found, console)
    finally:
        if others is not None:
            others.stop()
        if not (folder.path / bundle.RUN_FILE).exists():
            _remove_empty(folder.path / "search")


def _refuse_fresh(recipe: Recipe, folder: Run) -> None:
    """A study in a database stays when the run folder is moved, and the new run would find it over; and whoever still
    works on the old study would write into the new one.
    """
    if is_at_work(folder.path / "search"):
        raise RunError(f"{folder.path}: other workers are still at it. Stop them first, or name=… another run.")
    storage = recipe.search.storage if recipe.search is not None else None
    if storage is not None:
        raise RunError(
            f"{folder.path}: --fresh moves the run folder, but the study lies in {without_password(storage)}. Search"
            f" beside it with name={folder.name}-2, or name another search.storage."
        )


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it holds something, or was never made
        folder.rmdir()


def _join(recipe: Recipe, options: Options, folder: Run, inputs: dict[str, Any], console: Console) -> int | None:
    """Work beside whoever leads; None: nobody leads any more, so this process may."""
    started = time.monotonic()
    while _status(folder) != "training" or not _is_same(folder, inputs):
        if folder.is_free():
            return None
        if not is_helper() and time.monotonic() - started > JOIN_S:
            raise RunError(f"{folder.path}: another process holds it and began no search of this recipe. Wait for it.")
        time.sleep(LOOK_S)
    console.print(f"{folder.path}: a search is under way; this process joins it as one more worker.")
    ground = _ground(recipe, folder, inputs)
    found = work(ground, inputs, console, Part(_split(recipe).threads, options.quiet, leads=False))
    if found is None:
        console.print("Stopped. The other workers go on; the same command joins again.")
        return INTERRUPTED
    while not is_helper() and not _is_budget_of(folder, inputs) and not folder.is_free():
        time.sleep(LOOK_S)  # whoever leads had fewer trials: the result of all of them is written here
    if is_helper() or not folder.is_free() or (_status(folder) != "training" and _is_budget_of(folder, inputs)):
        console.print(f"{folder.path}: every trial has ended; the process that leads writes the result.")
        return 0
    return None


def _is_finished(folder: Run, inputs: dict[str, Any]) -> bool:
    """Whether the search is there and done; more trials than it had, or more minutes, take it up again."""
    facts = facts_of_begun(folder, inputs)
    if facts is None:
        return False
    refuse_changed(folder, kept(facts["inputs"]), kept(inputs))
    return bool(facts["status"] == "finished") and _is_budget_of(folder, inputs)


def _is_budget_of(folder: Run, inputs: dict[str, Any]) -> bool:
    """Whether the run was last taken up with this budget."""
    begun = folder.facts()["inputs"]
    return all(begun["recipe"].get(f"search.{key}") == inputs["recipe"].get(f"search.{key}") for key in BUDGET)


def _is_same(folder: Run, inputs: dict[str, Any]) -> bool:
    refuse_changed(folder, kept(folder.facts()["inputs"]), kept(inputs))
    return True


def _status(folder: Run) -> str:
    if not (folder.path / bundle.RUN_FILE).exists():
        return ""
    return str(folder.facts().get("status", ""))


def _split(recipe: Recipe) -> Split:
    assert isinstance(recipe.base, Base)  # a search over a base from scratch is refused when the recipe is read
    base = find_folder(recipe.base, weights=True)
    size = sum(file.stat().st_size for file in weight_files(base, recipe.base.model))
    return split_machine(recipe, place_here(), count_cores(), size)


def _helpers(options: Options, folder: Run, split: Split) -> Others | None:
    if split.workers < 2:
        return None
    disk.make_folder(folder.path / "search")
    command = [*shlex.split(options.command), "--runs", str(options.runs), "--quiet"]
    return Others(command, folder.path / "search", split.workers - 1, split.threads)


def _ground(recipe: Recipe, folder: Run, inputs: dict[str, Any]) -> Ground:
    assert isinstance(recipe.base, Base)  # a search over a base from scratch is refused when the recipe is read
    base = _base(recipe)
    rows = CachedRows(recipe, base, inputs["data"])
    rows.of(recipe)  # a mistake in the data is told before anything is written
    return Ground(recipe, base, rows, folder.path / "search", folder.checkpoints)


def _base(recipe: Recipe) -> LoadedBase:
    assert isinstance(recipe.base, Base)  # as above
    device = place_here().device
    return load_base(recipe.base, device, weight_dtype(recipe, device))


def _begin(recipe: Recipe, options: Options, folder: Run, inputs: dict[str, Any], ground: Ground) -> None:
    """Write what the search is; where it goes on, only that it does, and what of it may change."""
    if (folder.path / bundle.RUN_FILE).exists():
        disk.write_text(folder.recipe_file, to_yaml(without_secrets(recipe)))
        folder.update(status="training", inputs=inputs, command=command_line(_shown(recipe, options)))
        return
    renderer = make_renderer(recipe, ground.base)
    begin(folder, without_secrets(recipe), _shown(recipe, options), inputs, ground.plan(recipe), renderer, {})


def _shown(recipe: Recipe, options: Options) -> Options:
    """The call as it may be written down: a storage among its overrides without its password."""
    storage = recipe.search.storage if recipe.search is not None else None
    if storage is None:
        return options
    words = [word.replace(storage, without_password(storage)) for word in shlex.split(options.command)]
    return replace(options, command=shlex.join(words))


# The result


def _result(recipe: Recipe, folder: Run, ground: Ground, found: Found, console: Console) -> int:
    """Make the best trial's adapter the run's, measure it once on the untouched talk, and finish the run."""
    if found.folder is None or found.fitted is None:
        if found.where:
            console.print(
                f"The best trial's adapter lies with the worker that trained it ({found.where}), which writes the"
                " result. Its values: " + ", ".join(f"{key} {value}" for key, value in found.values.items()) + "."
                f" Where that worker's run folder is gone: python -m toolkit.train {ground.folder / 'best.yaml'}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            return 0
        raise RunError(
            f"{ground.folder}: no trial was trained to its end, so there is no result. Why each failed stands in"
            " trials.csv. Change the space and take another name, or --fresh."
        )
    rows, corpus = ground.rows.of(recipe), ground.rows.corpus
    judge = _judge(recipe, ground)
    target = _take_over(folder, found)  # before anything that takes long: a worker that joins may find a better one
    before = judge.measure_base()
    after = judge.measure(_worn(target, ground))
    disk.write_text(folder.path / "samples.md", judge.samples_markdown(before, after))
    _track(recipe, folder, found, judge, {"before": before, "after": after}, console.print)
    facts = {
        **data_facts(corpus, rows),
        "fit": asdict(found.fitted),
        "search": found.facts,
        "results": {"before": before, "after": after},
        "labels": list(judge.held.labels),
    }
    section = search_markdown(found.facts)
    finish(folder, recipe, ground.base, facts, section)
    show_result(folder, console)
    console.print(section, highlight=False, markup=False, soft_wrap=True)
    return 0


def _prepare_result(recipe: Recipe, ground: Ground) -> None:
    """What the result needs whoever wins: the bare base measured (kept in the cache), and what is slow to import."""
    importlib.import_module("toolkit.search.results")
    _judge(recipe, ground).measure_base()


def _judge(recipe: Recipe, ground: Ground) -> Judge:
    renderer = make_renderer(recipe, ground.base)
    return make_judge(recipe, ground.base, renderer, ground.rows.corpus, ground.rows.of(recipe))


def _take_over(folder: Run, found: Found) -> Path:
    """The best trial's adapter, or whole model, becomes the run's; where it lies now."""
    assert found.folder is not None  # looked at before
    whole = found.folder / WHOLE_MODEL
    source = whole if whole.is_dir() else found.folder / "adapter"
    target = folder.path / WHOLE_MODEL if whole.is_dir() else folder.adapter()
    disk.make_folder(target.parent)
    disk.copy_folder(source, target)
    disk.remove(folder.adapter() if whole.is_dir() else folder.path / WHOLE_MODEL)  # of an earlier, shorter search
    return target


def _worn(target: Path, ground: Ground) -> nn.Module:
    """The base with the adapter that lies there, or the whole model."""
    if target.name == WHOLE_MODEL:
        model: nn.Module = load_base(Base(model=str(target)), str(ground.base.device), ground.base.dtype).model
        return model
    return kind_in_folder(target).load(ground.base.model, target, base_hash=ground.base.hash)


def _track(
    recipe: Recipe,
    folder: Run,
    found: Found,
    judge: Judge,
    results: dict[str, dict[str, Any]],
    warn: Callable[[str], None],
) -> None:
    """A line a trial, in the order of their numbers, then the result."""
    config = {**config_of(folder.facts()["inputs"]), **{f"found.{key}": of for key, of in found.facts.items()}}
    track = open_track(folder.path, recipe.track, config, -1, warn)  # all of them, from trial 0 on
    for number, values in found.history:
        track.log(number, **values)
    last = found.history[-1][0] + 1 if found.history else 1
    track.log(last, **tracked_numbers(results["after"]))
    track.text(last, "samples", judge.samples_markdown(**results))
    track.table(last, "answers", sample_cells(**results))
    track.files(folder.name, folder.adapter() if folder.adapter().is_dir() else folder.path / WHOLE_MODEL)
    track.close()
