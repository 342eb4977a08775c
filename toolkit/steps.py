"""The steps that every run takes, whatever it trains: read, begin, judge, finish. pipeline.py and searching.py put them
in order.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import bundle, disk
from toolkit.bases.load import LoadedBase
from toolkit.bundle import Run
from toolkit.card import write_card
from toolkit.corpus.gather import Corpus, gather
from toolkit.corpus.render import Renderer
from toolkit.errors import RunError
from toolkit.evaluate.classify import label_set
from toolkit.fit.inputs import refuse_changed, surroundings
from toolkit.fit.plan import Plan, is_new
from toolkit.fit.prepare import Rows, make_renderer, open_base, render_rows
from toolkit.judge import Held, Judge, metrics_of, prompts_of, sampling_of
from toolkit.recipe.model import Base, Recipe
from toolkit.recipe.show import to_yaml

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
    renderer: Renderer,
    before: dict[str, Any],
) -> None:
    """Write what a run is before it trains; a run that goes on finds it there."""
    if not is_main():
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
        command=command_line(options),
        inputs=inputs,
        plan=plan.facts(),
        surroundings=surroundings(),
        template=disk.hash_text(renderer.template),
    )


def command_line(options: Options) -> str:
    """The call as a user would type it."""
    return f"python -m toolkit.train {options.command}"


def make_judge(recipe: Recipe, base: LoadedBase, renderer: Renderer, corpus: Corpus, rows: Rows) -> Judge:
    """What measures this recipe's models on its held-out talk."""
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


def measured_before(recipe: Recipe, folder: Run, judge: Judge) -> dict[str, Any]:
    """What the bare base does; measured once a run. A base from scratch knows nothing yet."""
    if is_new(recipe):
        return {}
    kept = folder.checkpoints / bundle.BEFORE_FILE
    if (folder.path / bundle.RUN_FILE).exists() and kept.exists():
        before: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return before
    return judge.measure_base()


def finish(folder: Run, recipe: Recipe, base: LoadedBase, found: dict[str, Any], section: str = "") -> None:
    """Say what came out, then mark the run finished, last of all, and drop what only an unfinished run needs.

    `section`: more for the card, as Markdown.
    """
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
    write_card(folder, section)
    folder.update(status="finished")
    bundle.drop_checkpoints(folder, recipe.train.keep)


def data_facts(corpus: Corpus, rows: Rows) -> dict[str, Any]:
    """What was read, kept and dropped, as run.json keeps it."""
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


def in_short(recipe: Recipe, base: LoadedBase, corpus: Corpus, rows: Rows) -> str:
    """The run in one line, before it trains."""
    report = corpus.report
    dropped = sum(report.dropped.values()) + sum(n for reason, n in rows.dropped.items() if reason != "old_turns")
    return (
        f"{recipe.name}: {recipe.adapter.kind} on {base.source}; {report.loaded:,} conversations, {dropped:,} dropped;"
        f" {len(rows.train):,} to learn from, {len(rows.valid):,} to watch, {len(rows.test):,} to judge by."
    )
