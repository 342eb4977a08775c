"""A run in order: read this file to know what training does. A search has an order of its own: searching.py."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit import disk
from toolkit.adapters.kinds import kind_of
from toolkit.bases.load import LoadedBase
from toolkit.bundle import Run
from toolkit.evaluate.talk import held_out_loss
from toolkit.fit.display import Display
from toolkit.fit.inputs import inputs_of
from toolkit.fit.memory import find_micro_batch
from toolkit.fit.one import Job, fit_one
from toolkit.fit.plan import Plan, is_new, make_plan
from toolkit.fit.prepare import Rows, place_here, shape_of, training_rows
from toolkit.judge import tracked_numbers
from toolkit.labelling import is_for_encoder
from toolkit.labelling import run as label
from toolkit.loaded import WHOLE_MODEL
from toolkit.recipe.model import Recipe
from toolkit.steps import (
    Begun,
    Options,
    Ready,
    begin,
    data_facts,
    finish,
    in_its_folder,
    in_short,
    is_main,
    make_judge,
    measured_before,
    plan_of,
    prepare,
    save_adapter,
    tracking,
)
from toolkit.track import sample_cells


def run(recipe: Recipe, options: Options) -> int:
    """Train what the recipe says into RUNS/NAME, or go on where it stopped. Returns the exit code.

    Raises MaltuError for everything the user can do something about; a run that raised goes on with the same command.
    """
    if is_for_encoder(recipe):
        return label(recipe, options)
    return in_its_folder(recipe, options, inputs_of(recipe), lambda: prepare(recipe), _train)


def _train(begun: Begun, ready: Ready) -> bool:
    recipe, options, folder, inputs, console = begun.recipe, begun.options, begun.folder, begun.inputs, begun.console
    corpus, base, renderer, rows = ready.corpus, ready.base, ready.renderer, ready.rows
    console.print(in_short(recipe, base, corpus, rows), highlight=False)
    goes_on = begun.goes_on
    learnable = training_rows(recipe, base, rows)
    # The processes meet here, before one of them writes.
    plan = plan_of(begun, len(learnable), lambda: _plan(recipe, base, rows))
    judge = make_judge(recipe, base, renderer, corpus, rows)
    before = measured_before(recipe, folder, judge)
    kind = kind_of(recipe.adapter)
    learned = sorted({i for row in rows.train for i in row.input_ids})
    model = kind.attach(base.model, recipe.adapter, seed=recipe.train.seed, token_ids=learned, tokenizer=base.tokenizer)
    if not goes_on:
        plan = find_micro_batch(model, learnable, plan, base.tokenizer.pad_token_id or 0, base.device)
        begin(folder, recipe, options, inputs, plan, renderer, before)
    with tracking(begun) as track:
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
        fitted = fit_one(job, lambda total: Display(console, total, options.quiet or not is_main()))
        if fitted.stopped == "asked" or not is_main():
            return fitted.stopped != "asked"
        model.eval()
        _save(folder, recipe, base, kind, model)
        after = judge.measure(model)
        disk.write_text(folder.path / "samples.md", judge.samples_markdown(before, after))
        track.log(fitted.steps, **tracked_numbers(after))
        track.text(fitted.steps, "samples", judge.samples_markdown(before, after))
        track.table(fitted.steps, "answers", sample_cells(before, after))
        track.files(folder.name, folder.adapter() if folder.adapter().is_dir() else folder.path / WHOLE_MODEL)
    results = {"before": before, "after": after}
    finish(
        folder,
        recipe,
        base,
        {**data_facts(corpus, rows), "fit": asdict(fitted), "results": results, "labels": list(judge.held.labels)},
    )
    return True


def _plan(recipe: Recipe, base: LoadedBase, rows: Rows) -> Plan:
    longest = base.context if is_new(recipe) else max(len(row.input_ids) for row in rows.train)
    return make_plan(recipe, shape_of(base.model, base.context), place_here(), longest)


def _save(folder: Run, recipe: Recipe, base: LoadedBase, kind: Any, model: Any) -> None:
    if recipe.adapter.kind != "full":
        save_adapter(folder, kind, model, base)
        return

    def fill(target: Path) -> None:
        kind.save(model, target, base=base.source, base_hash=base.hash)
        base.tokenizer.chat_template = base.template
        base.tokenizer.save_pretrained(target)

    disk.write_folder(folder.path / WHOLE_MODEL, fill)
