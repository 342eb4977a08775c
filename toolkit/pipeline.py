"""A run in order: read this file to know what training does."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from toolkit import bundle, disk
from toolkit.adapters.kinds import kind_of
from toolkit.bases.load import LoadedBase
from toolkit.bundle import Run
from toolkit.card import show_result, write_card
from toolkit.corpus.gather import Corpus, gather
from toolkit.corpus.render import Renderer
from toolkit.errors import Problem, RecipeError, RunError
from toolkit.evaluate.classify import label_set
from toolkit.evaluate.talk import held_out_loss
from toolkit.fit.display import Display
from toolkit.fit.fitted import Fitted
from toolkit.fit.inputs import inputs_of, refuse_changed, surroundings
from toolkit.fit.memory import find_micro_batch
from toolkit.fit.one import Job, fit_one
from toolkit.fit.plan import Plan, count_steps, is_new, make_plan
from toolkit.fit.prepare import (
    Rows,
    make_renderer,
    meet,
    open_base,
    place_here,
    render_rows,
    said_by_main,
    shape_of,
    training_rows,
)
from toolkit.judge import Held, Judge, metrics_of, prompts_of, sampling_of
from toolkit.loaded import WHOLE_MODEL
from toolkit.quiet import quiet
from toolkit.recipe.model import Base, Recipe
from toolkit.recipe.show import to_yaml
from toolkit.track import Track, open_track

INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """How the command was called: where runs lie, whether an old run of this name is set aside, how much is said."""

    runs: Path
    fresh: bool = False
    quiet: bool = False
    command: str = ""


def run(recipe: Recipe, options: Options) -> int:
    """Train what the recipe says into RUNS/NAME, or go on where it stopped. Returns the exit code.

    Raises MaltuError for everything the user can do something about; a run that raised goes on with the same command.
    """
    console = Console(quiet=options.quiet or not _is_main())
    folder = Run(options.runs / recipe.name)
    inputs = inputs_of(recipe)
    ready: Ready | None = None
    folder.refuse_foreign()
    with quiet():
        if options.fresh and _is_main() and folder.path.exists():
            with folder.locked():
                ready = _prepare(recipe)  # a mistake in data or base leaves the old run in its place
                console.print(f"The old run lies in {bundle.set_aside(folder)} now.")
        meet()
        with folder.locked() if _is_main() else contextlib.nullcontext():
            if _is_finished(folder, inputs):
                if _is_main():  # a kill right after the end leaves them
                    bundle.drop_checkpoints(folder, recipe.train.keep)
                console.print(f"{folder.path}: finished already, and nothing changed.")
                show_result(folder, console)
                return 0
            fitted = _train(recipe, options, folder, inputs, console, ready or _prepare(recipe))
            if fitted.stopped == "asked":
                console.print("Stopped. The same command goes on where it stopped.")
                return INTERRUPTED
            if _is_main():
                show_result(folder, console)
    return 0


@dataclass(frozen=True)
class Ready:
    """What a run stands on, read and found sound before anything is written."""

    corpus: Corpus
    base: LoadedBase
    renderer: Renderer
    rows: Rows


def _prepare(recipe: Recipe) -> Ready:
    corpus = gather(recipe.data, recipe.train.seed, None)
    base = open_base(recipe, corpus)
    renderer = make_renderer(recipe, base)
    return Ready(corpus, base, renderer, render_rows(recipe, renderer, corpus))


def _train(
    recipe: Recipe, options: Options, folder: Run, inputs: dict[str, Any], console: Console, ready: Ready
) -> Fitted:
    corpus, base, renderer, rows = ready.corpus, ready.base, ready.renderer, ready.rows
    console.print(_in_short(recipe, base, corpus, rows), highlight=False)
    goes_on = (folder.path / bundle.RUN_FILE).exists()
    plan = _plan(recipe, folder, base, rows)  # the processes meet here, before one of them writes
    judge = _judge(recipe, base, renderer, corpus, rows)
    before = _before(recipe, folder, judge)
    kind = kind_of(recipe.adapter)
    learned = sorted({i for row in rows.train for i in row.input_ids})
    model = kind.attach(base.model, recipe.adapter, seed=recipe.train.seed, token_ids=learned, tokenizer=base.tokenizer)
    learnable = training_rows(recipe, base, rows)
    if not goes_on:
        plan = find_micro_batch(model, learnable, plan, base.tokenizer.pad_token_id or 0, base.device)
        _begin(folder, recipe, options, inputs, plan, renderer, before)
    with _tracking(folder, recipe, inputs, console) as track:
        job = Job(
            recipe=recipe,
            plan=plan,
            model=model,
            tokenizer=base.tokenizer,
            rows=learnable,
            evaluate=(lambda m: held_out_loss(m, base.tokenizer, rows.valid).loss) if rows.valid else None,
            run=folder,
            track=track,
        )
        fitted = fit_one(job, lambda total: Display(console, total, options.quiet or not _is_main()))
        if fitted.stopped == "asked" or not _is_main():
            return fitted
        model.eval()
        _save_adapter(folder, recipe, base, kind, model)
        after = judge.measure(model)
        disk.write_text(folder.path / "samples.md", judge.samples_markdown(before, after))
        track.log(fitted.steps, **judge.numbers(after))
        track.text(fitted.steps, "samples", judge.samples_markdown(before, after))
    results = {"before": before, "after": after}
    _finish(
        folder,
        recipe,
        base,
        {**_data_facts(corpus, rows), "fit": asdict(fitted), "results": results, "labels": list(judge.held.labels)},
    )
    return fitted


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_finished(folder: Run, inputs: dict[str, Any]) -> bool:
    """Whether the run is there and done. Raises RunError when it was started with something else."""
    if not (folder.path / bundle.RUN_FILE).exists():
        return False
    facts = folder.facts()
    begun = facts.get("inputs")
    if not isinstance(begun, dict) or begun.keys() != inputs.keys() or "status" not in facts:
        raise RunError(
            f"{folder.path / bundle.RUN_FILE}: does not say what the run was trained on, or how far it came. Restore"
            " it from a copy, train with another name=…, or --fresh."
        )
    refuse_changed(folder, begun, inputs)
    return bool(facts["status"] == "finished")


def _plan(recipe: Recipe, folder: Run, base: LoadedBase, rows: Rows) -> Plan:
    """The plan that the run was begun with, or a new one."""
    if _is_main() and (folder.path / bundle.RUN_FILE).exists():
        return said_by_main(Plan(**folder.facts()["plan"]))
    learned = len(training_rows(recipe, base, rows)) if is_new(recipe) else len(rows.train)
    total = count_steps(learned, recipe)[1]
    late = [step for step in recipe.train.keep if step > total]
    if late:
        says = f"step {late[0]} never comes: this run takes {total} steps. Take it out."
        raise RecipeError(recipe.name, [Problem("train.keep", says)])
    longest = base.context if is_new(recipe) else max(len(row.input_ids) for row in rows.train)
    return said_by_main(make_plan(recipe, shape_of(base.model, base.context), place_here(), longest))


def _begin(
    folder: Run,
    recipe: Recipe,
    options: Options,
    inputs: dict[str, Any],
    plan: Plan,
    renderer: Renderer,
    before: dict[str, Any],
) -> None:
    """Write what a run is before it trains; a run that goes on finds it there."""
    if not _is_main():
        return
    disk.write_text(folder.recipe_file, to_yaml(recipe))
    disk.write_text(folder.path / "template.jinja", renderer.template)
    serve = recipe.serve
    sampling = {"temperature": serve.temperature, "top_p": serve.top_p, "max_tokens": serve.max_tokens}
    disk.write_json(folder.path / "generation.json", sampling)
    disk.make_folder(folder.checkpoints)
    disk.write_json(folder.checkpoints / bundle.BEFORE_FILE, before)
    folder.update(
        status="training",
        task=recipe.task,
        command=f"python -m toolkit.train {options.command}",
        inputs=inputs,
        plan=plan.facts(),
        surroundings=surroundings(),
        template=disk.hash_text(renderer.template),
    )


def _judge(recipe: Recipe, base: LoadedBase, renderer: Renderer, corpus: Corpus, rows: Rows) -> Judge:
    part, held_rows = rows.held_out()
    talks = [getattr(corpus, part)[i] for i in rows.kept_talks[part]]
    learned = tuple(corpus.train) if recipe.task == "classify" else ()
    held = Held(
        tuple(talks),
        tuple(held_rows),
        prompts_of(recipe),
        label_set(learned) if learned else (),
        learned,
        metrics_of(recipe),
    )
    return Judge(recipe.task, base, renderer, held, sampling_of(recipe))


def _before(recipe: Recipe, folder: Run, judge: Judge) -> dict[str, Any]:
    """What the bare base does; measured once a run. A base from scratch knows nothing yet."""
    if is_new(recipe):
        return {}
    kept = folder.checkpoints / bundle.BEFORE_FILE
    if (folder.path / bundle.RUN_FILE).exists() and kept.exists():
        before: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return before
    return judge.measure_base()


@contextlib.contextmanager
def _tracking(folder: Run, recipe: Recipe, inputs: dict[str, Any], console: Console) -> Iterator[Track]:
    last = folder.last_checkpoint()
    step = int(last.name.removeprefix("step-")) if last else 0
    names = recipe.track if _is_main() else ()
    track = open_track(folder.path, names, inputs["recipe"], step, console.print)
    try:
        yield track
    finally:
        track.close()


def _save_adapter(folder: Run, recipe: Recipe, base: LoadedBase, kind: Any, model: Any) -> None:
    if recipe.adapter.kind != "full":
        target = folder.adapter()
        disk.make_folder(target.parent)
        disk.write_folder(target, lambda f: kind.save(model, f, base=base.source, base_hash=base.hash))
        return

    def fill(target: Path) -> None:
        kind.save(model, target, base=base.source, base_hash=base.hash)
        base.tokenizer.chat_template = base.template
        base.tokenizer.save_pretrained(target)

    disk.write_folder(folder.path / WHOLE_MODEL, fill)


def _finish(folder: Run, recipe: Recipe, base: LoadedBase, found: dict[str, Any]) -> None:
    """Say what came out, then mark the run finished, last of all, and drop what only an unfinished run needs."""
    named = recipe.base
    keys = {"revision", "quantize", "trust_remote_code"}
    folder.update(
        base={
            "model": base.source,
            "folder": None if is_new(recipe) else str(base.folder.resolve()),
            "hash": base.hash,
            **(named.model_dump(include=keys) if isinstance(named, Base) else {}),
        },
        **found,
    )
    write_card(folder)
    folder.update(status="finished")
    bundle.drop_checkpoints(folder, recipe.train.keep)


def _data_facts(corpus: Corpus, rows: Rows) -> dict[str, Any]:
    report = corpus.report
    return {
        "data": {
            "loaded": report.loaded,
            "kept": report.kept,
            "dropped": {**report.dropped, **rows.dropped},
            "fixed": dict(report.fixed),
            "masked": dict(report.masked),
            "parts": {"train": len(rows.train), "valid": len(rows.valid), "test": len(rows.test)},
        }
    }


def _in_short(recipe: Recipe, base: LoadedBase, corpus: Corpus, rows: Rows) -> str:
    report = corpus.report
    dropped = sum(report.dropped.values()) + sum(n for reason, n in rows.dropped.items() if reason != "old_turns")
    return (
        f"{recipe.name}: {recipe.adapter.kind} on {base.source}; {report.loaded:,} conversations, {dropped:,} dropped;"
        f" {len(rows.train):,} to learn from, {len(rows.valid):,} to watch, {len(rows.test):,} to judge by."
    )
