"""A search in order: read this file to know what the command does with a recipe that has a `search`.

The process that holds the run folder's lock leads: it begins the run, starts helpers on a CPU, and writes the result.
Another process with the same command finds the lock held and joins as one more worker. All do the same work in between
(search/run.py); whoever is there when the study is over and holds the best adapter writes the result.
"""

import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import psutil
from rich.console import Console
from torch import nn

from toolkit import bundle, disk
from toolkit.adapters.kinds import kind_in_folder
from toolkit.bases.files import weight_files
from toolkit.bases.load import LoadedBase, load_base
from toolkit.bundle import Run
from toolkit.card import show_result
from toolkit.errors import BusyError, RunError
from toolkit.fit.cached import CachedRows
from toolkit.fit.inputs import inputs_of, refuse_changed
from toolkit.fit.prepare import make_renderer, place_here, weight_dtype
from toolkit.loaded import WHOLE_MODEL
from toolkit.quiet import quiet
from toolkit.recipe.model import Base, Recipe
from toolkit.recipe.space import without_password
from toolkit.search.crew import Ground
from toolkit.search.identity import kept
from toolkit.search.run import Found, Others, is_helper, work
from toolkit.search.split import Split, split_machine
from toolkit.search.words import search_markdown
from toolkit.steps import INTERRUPTED, Options, begin, data_facts, finish, in_short, make_judge
from toolkit.track import open_track

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
    inputs = inputs_of(_without_password(recipe))
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
        _ground(recipe, folder, inputs)  # a mistake in data or base leaves the old run in its place
        console.print(f"The old run lies in {bundle.set_aside(folder)} now.")
        return run(recipe, Options(options.runs, False, options.quiet, options.command))
    if _is_finished(recipe, folder, inputs):
        bundle.drop_checkpoints(folder, ())
        console.print(f"{folder.path}: finished already, and nothing changed.")
        show_result(folder, console)
        return 0
    split = _split(recipe)
    others = _helpers(options, folder, split)
    try:
        ground = _ground(recipe, folder, inputs)
        rows = ground.rows.of(recipe)
        console.print(in_short(recipe, ground.base, ground.rows.corpus, rows), highlight=False)
        _begin(recipe, options, folder, inputs, ground)
        found = work(ground, inputs, split.threads, console, is_quiet=options.quiet)
        if found is None:
            console.print("Stopped. The same command goes on where it stopped.")
            return INTERRUPTED
        if others is not None:
            for said in others.wait():
                console.print(said, highlight=False, markup=False)
        return _result(recipe, folder, ground, found, console)
    finally:
        if others is not None:
            others.stop()


def _join(recipe: Recipe, options: Options, folder: Run, inputs: dict[str, Any], console: Console) -> int | None:
    """Work beside whoever leads; None: nobody leads any more, so this process may."""
    started = time.monotonic()
    while _status(folder) != "training" or not _is_same(folder, inputs):
        if folder.is_free():
            return None
        if time.monotonic() - started > JOIN_S:
            raise RunError(f"{folder.path}: another process holds it and began no search of this recipe. Wait for it.")
        time.sleep(LOOK_S)
    console.print(f"{folder.path}: a search is under way; this process joins it as one more worker.")
    ground = _ground(recipe, folder, inputs)
    found = work(ground, inputs, _split(recipe).threads, console, is_quiet=options.quiet)
    if found is None:
        console.print("Stopped. The other workers go on; the same command joins again.")
        return INTERRUPTED
    return None if not is_helper() and folder.is_free() and _status(folder) == "training" else 0


def _is_finished(recipe: Recipe, folder: Run, inputs: dict[str, Any]) -> bool:
    """Whether the search is there and done; more trials than it had, or more minutes, take it up again."""
    if not (folder.path / bundle.RUN_FILE).exists():
        return False
    facts = folder.facts()
    begun = facts.get("inputs")
    if not isinstance(begun, dict) or begun.keys() != inputs.keys() or "status" not in facts:
        raise RunError(
            f"{folder.path / bundle.RUN_FILE}: does not say what the search was begun with. Restore it from a copy,"
            " search with another name=…, or --fresh."
        )
    refuse_changed(folder, kept(begun), kept(inputs))
    budget = [
        {key: of["recipe"].get(f"search.{key}") for key in ("trials", "minutes", "patience")} for of in (begun, inputs)
    ]
    return bool(facts["status"] == "finished") and budget[0] == budget[1]


def _is_same(folder: Run, inputs: dict[str, Any]) -> bool:
    refuse_changed(folder, kept(folder.facts()["inputs"]), kept(inputs))
    return True


def _status(folder: Run) -> str:
    if not (folder.path / bundle.RUN_FILE).exists():
        return ""
    return str(folder.facts().get("status", ""))


def _split(recipe: Recipe) -> Split:
    from toolkit.bases.fetch import find_folder

    assert isinstance(recipe.base, Base)  # a search over a base from scratch is refused when the recipe is read
    base = find_folder(recipe.base, weights=True)
    size = sum((base / name).stat().st_size for name in weight_files(base, recipe.base.model))
    return split_machine(recipe, place_here(), psutil.cpu_count(logical=False) or os.cpu_count() or 1, size)


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
        disk.write_text(folder.recipe_file, _yaml(recipe))
        folder.update(status="training", inputs=inputs)
        return
    renderer = make_renderer(recipe, ground.base)
    begin(folder, _without_password(recipe), options, inputs, ground.plan(recipe), renderer, {})


def _yaml(recipe: Recipe) -> str:
    from toolkit.recipe.show import to_yaml

    return to_yaml(_without_password(recipe))


def _without_password(recipe: Recipe) -> Recipe:
    search = recipe.search
    if search is None or search.storage is None:
        return recipe
    return recipe.model_copy(update={"search": search.model_copy(update={"storage": without_password(search.storage)})})


# The result


def _result(recipe: Recipe, folder: Run, ground: Ground, found: Found, console: Console) -> int:
    """Make the best trial's adapter the run's, measure it once on the untouched talk, and finish the run."""
    if found.folder is None or found.fitted is None:
        if found.where:
            console.print(
                f"The best trial's adapter lies with the worker that trained it ({found.where}), which writes the"
                " result. Its values: " + ", ".join(f"{key} {value}" for key, value in found.values.items())
            )
            return 0
        raise RunError(
            f"{ground.folder}: no trial was trained to its end, so there is no result. Why each failed stands in"
            " trials.csv. Change the space and take another name, or --fresh."
        )
    rows, corpus = ground.rows.of(recipe), ground.rows.corpus
    judge = make_judge(recipe, ground.base, make_renderer(recipe, ground.base), corpus, rows)
    before = judge.measure_base()
    model = _take_over(folder, ground, found)
    after = judge.measure(model)
    samples = judge.samples_markdown(before, after)
    disk.write_text(folder.path / "samples.md", samples)
    _track(recipe, folder, found, judge.numbers(after), samples, console.print)
    facts = {
        **data_facts(corpus, rows),
        "fit": asdict(found.fitted),
        "search": found.facts,
        "results": {"before": before, "after": after},
        "labels": list(judge.held.labels),
    }
    finish(folder, recipe, ground.base, facts)
    show_result(folder, console)
    console.print(search_markdown(found.facts), highlight=False, markup=False)
    return 0


def _take_over(folder: Run, ground: Ground, found: Found) -> nn.Module:
    """The best trial's adapter as the run's, and the model that wears it."""
    assert found.folder is not None  # looked at before
    whole = found.folder / WHOLE_MODEL
    source = whole if whole.is_dir() else found.folder / "adapter"
    target = folder.path / WHOLE_MODEL if whole.is_dir() else folder.adapter()
    disk.make_folder(target.parent)
    disk.write_folder(target, lambda path: _copy(source, path))
    if whole.is_dir():
        model: nn.Module = load_base(Base(model=str(target)), str(ground.base.device), ground.base.dtype).model
        return model
    return kind_in_folder(target).load(ground.base.model, target, base_hash=ground.base.hash)


def _copy(source: Any, target: Any) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def _track(
    recipe: Recipe,
    folder: Run,
    found: Found,
    numbers: dict[str, float],
    samples: str,
    warn: Callable[[str], None],
) -> None:
    """A line a trial, in the order of their numbers, then the result."""
    track = open_track(folder.path, recipe.track, found.facts, 0, warn)
    for number, values in found.history:
        track.log(number, **values)
    last = found.history[-1][0] + 1 if found.history else 1
    track.log(last, **numbers)
    track.text(last, "samples", samples)
    track.close()
