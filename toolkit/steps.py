"""The steps that every run takes, whatever it trains: read, begin, judge, finish. pipeline.py and searching.py put them
in order.
"""

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from toolkit import bundle, disk
from toolkit.adapters.contract import Kind
from toolkit.bases.encoder import LoadedEncoder
from toolkit.bases.load import LoadedBase
from toolkit.bundle import Run
from toolkit.card import show_result, write_card
from toolkit.corpus.gather import Corpus, gather
from toolkit.corpus.known import marks
from toolkit.corpus.manner import N_SCORED, manner_by_role, some_of
from toolkit.corpus.render import Rendered, Renderer
from toolkit.errors import BaseError, MaltuError, Problem, RecipeError, RunError
from toolkit.evaluate.classify import label_set
from toolkit.fit.classify import LabelRows
from toolkit.fit.inputs import refuse_changed, surroundings
from toolkit.fit.memory import peak_mb
from toolkit.fit.plan import Plan, count_steps, is_new
from toolkit.fit.prepare import PARTS, Rows, make_renderer, meet, open_base, render_rows, said_by_main
from toolkit.judge import Held, Judge, metrics_of, prompts_of, sampling_of
from toolkit.loaded import ENCODER
from toolkit.quiet import quiet
from toolkit.recipe.model import Base, Recipe
from toolkit.recipe.show import to_yaml
from toolkit.report.write import REPORT, write_report
from toolkit.track import Track, config_of, open_track

INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """How the command was called: where runs lie, whether an old run of this name is set aside, how much is said."""

    runs: Path
    fresh: bool = False
    quiet: bool = False
    command: str = ""


@dataclass(frozen=True)
class Ready:
    """What a run stands on, read and found sound before anything is written."""

    corpus: Corpus
    base: LoadedBase
    renderer: Renderer
    rows: Rows


def prepare(recipe: Recipe) -> Ready:
    """Read talk and base, and render. Raises: DataError, BaseError."""
    corpus = gather(recipe.data, recipe.train.seed, None)
    base = open_base(recipe, corpus)
    renderer = make_renderer(recipe, base)
    return Ready(corpus, base, renderer, render_rows(recipe, renderer, corpus))


@dataclass(frozen=True)
class Begun:
    """A run whose folder this process holds: what it was called with, and where it says how it goes."""

    recipe: Recipe
    options: Options
    folder: Run
    inputs: dict[str, Any]
    console: Console

    @property
    def goes_on(self) -> bool:
        """Whether it was begun before."""
        return (self.folder.path / bundle.RUN_FILE).exists()


def in_its_folder(
    recipe: Recipe,
    options: Options,
    inputs: dict[str, Any],
    ready: Callable[[], Any],
    train: Callable[[Begun, Any], bool],
) -> int:
    """Hold the run's folder and train, unless that was done before; show the result. Returns the exit code.

    inputs: what the run is started with. ready: reads talk and base, and writes nothing. train: gets what that gave;
    False: it was asked to stop.
    Raises MaltuError for everything the user can do something about; a run that raised goes on with the same command.
    """
    console = Console(quiet=options.quiet or not is_main())
    folder = Run(options.runs / recipe.name)
    found: Any = None
    folder.refuse_foreign()
    with quiet():
        if options.fresh and is_main() and folder.path.exists():
            with folder.locked():
                found = ready()  # a mistake in data or base leaves the old run in its place
                console.print(f"The old run lies in {bundle.set_aside(folder)} now.")
        meet()
        with folder.locked() if is_main() else contextlib.nullcontext():
            if is_finished(folder, inputs):
                if is_main():  # a kill right after the end leaves them
                    bundle.drop_checkpoints(folder, recipe.train.keep)
                    show_finished(folder, console)
                return 0
            if not train(Begun(recipe, options, folder, inputs, console), ready() if found is None else found):
                console.print("Stopped. The same command goes on where it stopped.")
                return INTERRUPTED
            if is_main():
                show_result(folder, console)
    return 0


def show_finished(folder: Run, console: Console) -> None:
    """What a run came to that was finished before. Its page is written where a kill right after the end left none."""
    if not (folder.path / REPORT).exists():
        report(folder, console)
    console.print(f"{folder.path}: finished already, and nothing changed.")
    show_result(folder, console)


def is_main() -> bool:
    """Whether this process writes: of those that torchrun started, the first."""
    return os.environ.get("RANK", "0") == "0"


def is_finished(folder: Run, inputs: dict[str, Any]) -> bool:
    """Whether the run is there and done. Raises RunError when it was started with something else."""
    facts = facts_of_begun(folder, inputs)
    if facts is None:
        return False
    refuse_changed(folder, facts["inputs"], inputs)
    return bool(facts["status"] == "finished")


def facts_of_begun(folder: Run, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """run.json of a run that was begun, None where there is none. Raises RunError when it does not say with what."""
    if not (folder.path / bundle.RUN_FILE).exists():
        return None
    facts = folder.facts()
    begun = facts.get("inputs")
    if not isinstance(begun, dict) or begun.keys() != inputs.keys() or "status" not in facts:
        raise RunError(
            f"{folder.path / bundle.RUN_FILE}: does not say what the run was trained on, or how far it came. Restore"
            " it from a copy, train with another name=…, or --fresh."
        )
    return facts


def begin(
    folder: Run,
    recipe: Recipe,
    options: Options,
    inputs: dict[str, Any],
    plan: Plan,
    renderer: Renderer | None,
    before: dict[str, Any],
) -> None:
    """Write what a run is before it trains; a run that goes on finds it there. No renderer: it will not talk."""
    if not is_main():
        return
    disk.write_text(folder.recipe_file, to_yaml(recipe))
    if renderer is not None:
        disk.write_text(folder.path / "template.jinja", renderer.template)
        serve = recipe.serve
        sampling = {"temperature": serve.temperature, "top_p": serve.top_p, "max_tokens": serve.max_tokens}
        disk.write_json(folder.path / "generation.json", sampling)
    disk.make_folder(folder.checkpoints)
    disk.write_json(folder.checkpoints / bundle.BEFORE_FILE, before)
    folder.update(
        status="training",
        task=recipe.task,
        command=command_line(options),
        inputs=inputs,
        plan=plan.facts(),
        surroundings=surroundings(),
        template=None if renderer is None else disk.hash_text(renderer.template),
    )


def refuse_late(recipe: Recipe, n_rows: int) -> None:
    """Raise RecipeError for a step to keep that never comes; n_rows: those of one epoch."""
    total = count_steps(n_rows, recipe)[1]
    late = [step for step in recipe.train.keep if step > total]
    if late:
        says = f"step {late[0]} never comes: this run takes {total} steps. Take it out."
        raise RecipeError(recipe.name, [Problem("train.keep", says)])


def plan_of(begun: Begun, n_learned: int, make: Callable[[], Plan]) -> Plan:
    """The plan that the run was begun with, or the one that `make` gives; the same in every process.

    n_learned: rows of one epoch, as the weights of files say. Raises: RecipeError as `refuse_late` and `make` do.
    """
    if is_main() and begun.goes_on:
        return said_by_main(Plan(**begun.folder.facts()["plan"]))
    refuse_late(begun.recipe, n_learned)
    return said_by_main(make())


def save_adapter(folder: Run, kind: Kind[Any], model: nn.Module, base: LoadedBase | LoadedEncoder) -> None:
    """Write what was learned into the run, whole or not at all."""
    target = folder.adapter()
    disk.make_folder(target.parent)
    disk.write_folder(target, lambda f: kind.save(model, f, base=base.source, base_hash=base.hash))


@contextlib.contextmanager
def tracking(begun: Begun) -> Iterator[Track]:
    """Where a run's numbers go while it lasts; one that goes on appends from its last checkpoint."""
    last = begun.folder.last_checkpoint()
    step = int(last.name.removeprefix("step-")) if last else 0
    names = begun.recipe.track if is_main() else ()
    track = open_track(begun.folder.path, names, config_of(begun.inputs), step, begun.console.print)
    try:
        yield track
    finally:
        track.close()


def command_line(options: Options) -> str:
    """The call as a user would type it."""
    return f"python -m toolkit.train {options.command}"


def make_judge(recipe: Recipe, base: LoadedBase, renderer: Renderer, corpus: Corpus, rows: Rows) -> Judge:
    """What measures this recipe's models on its held-out talk."""
    part, held_rows = rows.held_out()
    talks = [getattr(corpus, part)[i] for i in rows.kept_talks[part]]
    learned = tuple(corpus.train) if recipe.task != "chat" else ()
    held = Held(
        tuple(talks),
        tuple(held_rows),
        prompts_of(recipe),
        label_set(learned) if recipe.task == "classify" else (),
        learned,
        metrics_of(recipe),
    )
    return Judge(recipe.task, base, renderer, held, sampling_of(recipe))


def measured_before(recipe: Recipe, folder: Run, judge: Judge) -> dict[str, Any]:
    """What the bare base does; measured once a run. A base from scratch knows nothing yet."""
    if is_new(recipe):
        return {}
    kept = folder.checkpoints / bundle.BEFORE_FILE
    if (folder.path / bundle.RUN_FILE).exists() and kept.exists():
        before: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return before
    return judge.measure_base()


def finish(
    folder: Run,
    recipe: Recipe,
    base: LoadedBase | LoadedEncoder,
    found: dict[str, Any],
    section: str = "",
) -> None:
    """Say what came out, then mark the run finished, last of all, and drop what only an unfinished run needs. Its page,
    report.html, tells of a finished run and comes after.

    found: facts for run.json; of them `learned`, marks of talk, has a file of its own. `section`: more for the card, as
    Markdown.
    """
    named = recipe.base
    keys = {"revision", "quantize", "trust_remote_code"}
    disk.write_json(folder.path / bundle.LEARNED_FILE, {"marks": found.pop("learned")})
    folder.update(
        base={
            "model": base.source,
            "folder": None if is_new(recipe) else str(base.folder.resolve()),
            "hash": base.hash,
            **({"kind": ENCODER} if isinstance(base, LoadedEncoder) else {}),
            **(named.model_dump(include=keys) if isinstance(named, Base) else {}),
        },
        memory_mb=round(peak_mb(base.device), 1),
        **found,
    )
    write_card(folder, section)
    folder.update(status="finished")
    bundle.drop_checkpoints(folder, recipe.train.keep)
    report(folder, Console(stderr=True))


def report(folder: Run, console: Console) -> None:
    """Write report.html of a finished run. A page that cannot be written is told in a line, and the run is whole."""
    try:
        write_report(folder)
    except MaltuError as failed:
        again = f"python -m toolkit compare {shlex.quote(str(folder.path))}"
        says = f"The run is finished, but its report is not written: {failed} To write it: {again}"
        console.print(says, highlight=False, markup=False, soft_wrap=True)


def data_facts(corpus: Corpus, rows: Rows | LabelRows) -> dict[str, Any]:
    """What was read, kept and dropped, as run.json keeps it; how long rows are, and how spoken what they say is; and
    `learned`, the marks of what is learned."""
    report = corpus.report
    return {
        "data": {
            "loaded": report.loaded,
            "kept": report.kept,
            "dropped": {**report.dropped, **rows.dropped},
            "fixed": dict(report.fixed),
            "masked": dict(report.masked),
            "parts": {part: len(getattr(rows, part)) for part in PARTS},
            "tokens": {part: lengths for part in PARTS if (lengths := _lengths(getattr(rows, part)))},
            "spoken": _manner(corpus),
        },
        "learned": marks(corpus.train),
    }


def _manner(corpus: Corpus) -> dict[str, dict[str, Any]]:
    """How spoken each role's turns are, by a sample of what is learned from."""
    with contextlib.suppress(BaseError):  # the classifier is damaged: a number less, never a run lost
        of_roles = manner_by_role(some_of(corpus.train, N_SCORED))
        return {role: {lang: of.as_json() for lang, of in of_lang.items()} for role, of_lang in of_roles.items()}
    return {}


def _lengths(rows: Sequence[Rendered | tuple[list[int], list[int]]]) -> dict[str, int]:
    """How many tokens rows have; empty where there are none."""
    lengths = sorted(len(row.input_ids if isinstance(row, Rendered) else row[0]) for row in rows)
    if not lengths:
        return {}
    n = len(lengths)
    return {
        "median": lengths[n // 2],
        "nine_in_ten": lengths[int(0.9 * n)],
        "longest": lengths[-1],
        "total": sum(lengths),
    }


def in_short(recipe: Recipe, base: LoadedBase | LoadedEncoder, corpus: Corpus, rows: Rows | LabelRows) -> str:
    """The run in one line, before it trains."""
    report = corpus.report
    dropped = sum(report.dropped.values()) + sum(n for reason, n in rows.dropped.items() if reason != "old_turns")
    return (
        f"{recipe.name}: {recipe.adapter.kind} on {base.source}; {report.loaded:,} conversations, {dropped:,} dropped;"
        f" {len(rows.train):,} to learn from, {len(rows.valid):,} to watch, {len(rows.test):,} to judge by."
    )
