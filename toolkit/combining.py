"""A run of several adapters in order: read this file to know what the command does with `experts` and `combine`.

Experts are trained side by side, each on its own talk; then the combination is made of them (merged, routed, gated,
weighed); then everybody is measured on the same held-out talk, and the run says whether combining helped.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit import disk, pipeline
from toolkit.bases.files import hash_files
from toolkit.bundle import RUN_FILE, Run
from toolkit.combine.speaker import MAIN, own_run
from toolkit.disk import hash_file
from toolkit.ensemble.curves import Curves
from toolkit.ensemble.experts import Hooks, Seen
from toolkit.ensemble.ground import Ground, is_run, open_ground, shared_of
from toolkit.ensemble.make import Made, Workshop, count_steps_of, make
from toolkit.ensemble.reading import refuse_unread
from toolkit.errors import RunError
from toolkit.fit.display import Display
from toolkit.fit.inputs import flat, inputs_of
from toolkit.fit.stops import StopOnSignal
from toolkit.judge import Judge, tracked_numbers
from toolkit.jury import hear, section_of
from toolkit.loaded import WHOLE_MODEL
from toolkit.recipe.experts import expert_recipes, stands_alone, union
from toolkit.recipe.model import Recipe
from toolkit.shipped import resolve
from toolkit.steps import (
    Begun,
    Options,
    begin,
    data_facts,
    finish,
    in_its_folder,
    in_short,
    make_judge,
    measured_before,
)
from toolkit.track import Track, config_of, last_step, open_track, sample_cells

RUN = "run"  # how the inputs of a run name another one


def run(recipe: Recipe, options: Options) -> int:
    """Train the experts and combine them into RUNS/NAME, or go on where it stopped. Returns the exit code.

    Raises MaltuError for everything the user can do something about; a run that raised goes on with the same command.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            "A run of several adapters is not started by torchrun: they learn side by side in one process. Start it"
            " with python -m toolkit.train."
        )
    folder = Run(options.runs / recipe.name)
    inputs = None if options.fresh else _of_finished(recipe, folder)
    return in_its_folder(recipe, options, inputs or _inputs(recipe), lambda: _ready(recipe), _train)


def _ready(recipe: Recipe) -> Ground:
    ground = open_ground(recipe)
    refuse_unread(ground)
    return ground


def _inputs(recipe: Recipe) -> dict[str, Any]:
    """As of one adapter, over the files of all experts; and the adapters of those that exist already."""
    shared, _, found = shared_of(recipe)
    inputs = inputs_of(shared) | {"recipe": flat(recipe.model_dump(mode="json"))}
    inputs["data"] |= {f"{RUN} {run.path}": _hash_of(run) for run in found.values()} | _bases(recipe)
    return inputs


def _of_finished(recipe: Recipe, folder: Run) -> dict[str, Any] | None:
    """As `_inputs`, of a finished run that holds what it took over from runs which are gone by now: those are as they
    were when it began. None where nothing is gone, or the run still needs it.
    """
    gone = [one for one in expert_recipes(recipe).values() if isinstance(one, str) and not is_run(one)]
    if not gone or not (folder.path / RUN_FILE).exists() or (facts := folder.facts()).get("status") != "finished":
        return None
    before = facts.get("inputs")
    if not isinstance(before, dict) or not isinstance(before.get("data"), dict):
        return None  # told by whoever reads it next
    inputs = inputs_of(union(recipe)) | {"recipe": flat(recipe.model_dump(mode="json"))}
    known = inputs["data"] | _bases(recipe)
    inputs["data"] = known | {name: _now(name, hashed) for name, hashed in before["data"].items() if name not in known}
    return inputs


def _now(name: str, before: str) -> str:
    """What `_inputs` has of an existing run, or of its file, today; as it was where that is gone."""
    kind, _, path = name.partition(" ")
    if kind == RUN and is_run(path):
        return _hash_of(Run(Path(path)))
    return hash_file(resolve(name)) if resolve(name).is_file() else before


def _hash_of(run: Run) -> str:
    folder = run.path / WHOLE_MODEL if (run.path / WHOLE_MODEL).is_dir() else run.adapter()
    return hash_files(folder, sorted(folder.glob("*")))


def _bases(recipe: Recipe) -> dict[str, Any]:
    """Of members that stand on bases of their own those bases."""
    named = {name: one for name, one in expert_recipes(recipe).items() if isinstance(one, Recipe)}
    return {f"base of {name}": inputs_of(one)["base"] for name, one in named.items() if stands_alone(recipe, one)}


def _train(begun: Begun, ground: Ground) -> bool:
    recipe, folder, console = begun.recipe, begun.folder, begun.console
    console.print(in_short(recipe, ground.base, ground.corpus, ground.rows), highlight=False)
    judge = make_judge(ground.shared, ground.base, ground.renderer, ground.corpus, ground.rows)
    before = measured_before(recipe, folder, judge)
    if not begun.goes_on:
        rows = [(row.input_ids, row.labels) for row in ground.rows.train]
        plan = ground.plan(ground.shared, rows)
        begin(folder, recipe, begun.options, begun.inputs, plan, ground.renderer, before)
    take_in(ground, folder)
    if not _apart(begun, ground):
        return False
    display = Display(console, count_steps_of(ground), begun.options.quiet)
    with _tracking(begun) as track, contextlib.closing(Curves(folder, track)) as curves:
        with StopOnSignal(display.say) as stops, display:
            made = make(Workshop(ground, folder, _hooks(display, stops, curves)))
        if made is None or stops.is_asked:
            return False
        _finish(begun, ground, judge, before, made, track)
    return True


@contextlib.contextmanager
def _tracking(begun: Begun) -> Iterator[Track]:
    """Where numbers go; each member that goes on drops its own that did not last."""
    path = begun.folder.path
    step = last_step(path) if begun.goes_on else -1
    track = open_track(path, begun.recipe.track, config_of(begun.inputs), step, begun.console.print)
    try:
        yield track
    finally:
        track.close()


def _hooks(display: Display, stops: StopOnSignal, curves: Curves) -> Hooks:
    watch = _Watch(display)

    def stepped(seen: Sequence[Seen]) -> None:
        watch(seen)
        curves.stepped(seen)

    return Hooks(
        say=display.say,
        wants_stop=lambda: stops.is_asked,
        watch=stepped,
        begun=curves.begun,
        looked=curves.looked,
        gate_begun=curves.gate_begun,
        gate=curves.gate,
    )


def take_in(ground: Ground, folder: Run) -> None:
    """Copy the adapters of experts that exist into the run, so that it works without theirs."""
    for name, found in ground.found.items():
        target = folder.adapter(name)
        if not target.is_dir():
            disk.make_folder(target.parent)
            disk.copy_folder(found.adapter(), target)


def _apart(begun: Begun, ground: Ground) -> bool:
    """Members of a vote on bases of their own: trained as runs inside this one, or copied; False: asked to stop."""
    for name, one in ground.apart.items():
        target = own_run(begun.folder, name)
        if isinstance(one, Run):
            if not target.is_dir():
                disk.make_folder(target.parent)
                disk.copy_folder(one.path, target)
            continue
        begun.console.print(f"{name}: on a base of its own, so it is trained as a run of its own, {target}.")
        own = one.model_copy(update={"name": name})
        if pipeline.run(own, Options(target.parent, quiet=True, command=begun.options.command)):
            return False
    return True


class _Watch:
    """All members as one line of progress: steps of all together, their mean loss."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._steps: dict[str, int] = {}
        self._tokens: dict[str, int] = {}

    def __call__(self, seen: Sequence[Seen]) -> None:
        """After a step of all."""
        self._steps |= {one.name: one.step for one in seen}
        self._tokens |= {one.name: one.n_tokens for one in seen}
        if seen:
            loss = sum(one.loss for one in seen) / len(seen)
            self._display.step(sum(self._steps.values()), loss, sum(self._tokens.values()))


def _answer_with(folder: Run, best: str) -> None:
    """Of experts without a combination the best one answers for the run."""
    target = folder.adapter(MAIN)
    disk.remove(target)
    disk.copy_folder(folder.adapter(best), target)


def _finish(begun: Begun, ground: Ground, judge: Judge, before: dict[str, Any], made: Made, track: Track) -> None:
    """Measure everybody, say what came out, and finish the run."""
    recipe, folder = begun.recipe, begun.folder
    found = hear(ground, made, judge)
    if made.spec is None:
        _answer_with(folder, found.best)
    disk.write_text(folder.path / "samples.md", judge.samples_markdown(before, found.after))
    total = made.total()
    track.log(total.steps, **tracked_numbers(found.after))
    track.text(total.steps, "samples", judge.samples_markdown(before, found.after))
    track.table(total.steps, "answers", sample_cells(before, found.after))
    if (folder.path / "adapters").is_dir():  # experts that are other runs lie there
        track.files(folder.name, folder.path / "adapters")
    section = section_of(found.facts)
    facts: dict[str, Any] = {
        **data_facts(ground.corpus, ground.rows),
        "fit": asdict(total),
        "results": {"before": before, "after": found.after},
        "labels": list(judge.held.labels),
        **found.facts,
    }
    facts["learned"] = sorted({*facts["learned"], *ground.known})
    finish(folder, recipe, ground.base, facts, section)
    begun.console.print(section, highlight=False, markup=False, soft_wrap=True)
