"""A run of an encoder that labels texts, in order. It stands beside pipeline.py, which hands such recipes over."""

from dataclasses import asdict, dataclass

from toolkit import disk
from toolkit.adapters.lora import LoraKind
from toolkit.bases.encoder import LoadedEncoder, is_encoder, load_encoder
from toolkit.corpus.gather import Corpus, gather
from toolkit.evaluate.classify import label_set
from toolkit.evaluate.encoder import Labeller, pad_of
from toolkit.fit.classify import (
    LabelRows,
    epoch_rows,
    fit_labels,
    held_out_log_loss,
    label_plan,
    label_rows,
    refuse_misfits,
    with_adapter,
)
from toolkit.fit.display import Display
from toolkit.fit.fitted import Fitted
from toolkit.fit.inputs import inputs_of
from toolkit.fit.one import Job
from toolkit.fit.plan import max_length
from toolkit.fit.prepare import place_here, weight_dtype
from toolkit.judge import Held, labels_markdown, measured_labels, metrics_of, tracked_numbers
from toolkit.recipe.model import Base, Recipe
from toolkit.steps import (
    Begun,
    Options,
    begin,
    data_facts,
    finish,
    in_its_folder,
    in_short,
    is_main,
    plan_of,
    save_adapter,
    tracking,
)


@dataclass(frozen=True)
class Ready:
    """What a run stands on, read and found sound before anything is written."""

    corpus: Corpus
    base: LoadedEncoder
    rows: LabelRows


def is_for_encoder(recipe: Recipe) -> bool:
    """Whether the recipe is to label texts and its base is an encoder. Raises: BaseError where it cannot be told."""
    return recipe.task == "classify" and isinstance(recipe.base, Base) and is_encoder(recipe.base)


def run(recipe: Recipe, options: Options) -> int:
    """Train what the recipe says into RUNS/NAME, or go on where it stopped. Returns the exit code.

    Raises MaltuError for everything the user can do something about; a run that raised goes on with the same command.
    """
    refuse_misfits(recipe)
    return in_its_folder(recipe, options, inputs_of(recipe), lambda: prepare(recipe), _train)


def prepare(recipe: Recipe) -> Ready:
    """Read texts and base. Raises: DataError, BaseError, RecipeError."""
    assert isinstance(recipe.base, Base)  # is_for_encoder
    corpus = gather(recipe.data, recipe.train.seed, None)
    labels = label_set(tuple(corpus.train))
    device = place_here().device
    base = load_encoder(recipe.base, labels, device, weight_dtype(recipe, device), seed=recipe.train.seed)
    return Ready(corpus, base, label_rows(recipe, corpus, base, max_length(recipe, base.context)))


def _train(begun: Begun, ready: Ready) -> bool:
    recipe, folder, rows, base = begun.recipe, begun.folder, ready.rows, ready.base
    begun.console.print(in_short(recipe, base, ready.corpus, rows), highlight=False)
    if rows.n_unknown:
        share = rows.n_unknown / rows.n_tokens
        begun.console.print(f"{share:.1%} of the tokens are signs that its tokenizer does not know.", highlight=False)
    learnable = epoch_rows(recipe, rows)
    plan = plan_of(begun, len(learnable), lambda: label_plan(recipe, base, rows, place_here()))
    pad = pad_of(base.tokenizer)
    model = with_adapter(recipe, base)
    if not begun.goes_on:
        begin(folder, recipe, begun.options, begun.inputs, plan, None, {})
    with tracking(begun) as track:
        job = Job(
            recipe=recipe,
            plan=plan,
            model=model,
            tokenizer=base.tokenizer,
            rows=learnable,
            evaluate=(lambda m: held_out_log_loss(m, rows.valid, pad)) if rows.valid else None,
            run=folder,
            track=track,
        )
        quiet = begun.options.quiet or not is_main()
        fitted = fit_labels(job, lambda total: Display(begun.console, total, quiet))
        if fitted.stopped == "asked" or not is_main():
            return fitted.stopped != "asked"
        model.eval()
        save_adapter(folder, LoraKind(), model, base)
        held = _held(recipe, ready)
        after = measured_labels(Labeller(model, base.tokenizer, base.labels), held) if held.talks else {}
        track.log(fitted.steps, **tracked_numbers(after))
        if after:
            disk.write_text(folder.path / "samples.md", labels_markdown(held, after))
            track.text(fitted.steps, "samples", labels_markdown(held, after))
        track.files(folder.name, folder.adapter())
    _finish(begun, ready, fitted, after)
    return True


def _finish(begun: Begun, ready: Ready, fitted: Fitted, after: dict[str, object]) -> None:
    results = {"before": {}, "after": after}  # before: a head of random numbers: nothing to compare with
    found = {"fit": asdict(fitted), "results": results, "labels": list(ready.base.labels)}
    finish(begun.folder, begun.recipe, ready.base, {**data_facts(ready.corpus, ready.rows), **found})


def _held(recipe: Recipe, ready: Ready) -> Held:
    part = ready.rows.held_out()
    talks = tuple(getattr(ready.corpus, part)[place] for place in ready.rows.kept_talks[part])
    return Held(talks, (), (), ready.base.labels, tuple(ready.corpus.train), metrics_of(recipe))
