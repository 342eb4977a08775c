"""What a run would do, before it does it. Loads the tokenizer and the talk, never the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from toolkit.bases.encoder import is_encoder, sketch_encoder
from toolkit.bases.load import LoadedTokenizer, load_tokenizer
from toolkit.corpus.gather import Corpus, gather
from toolkit.corpus.manner import N_SCORED, manner_by_role, some_of
from toolkit.corpus.render import IGNORED, Rendered, Renderer
from toolkit.fit.plan import Place, Plan, Shape, activation_bytes, count_steps, make_plan, max_length
from toolkit.fit.prepare import Rows, place_here, render_rows, shape_of, weigh
from toolkit.recipe.model import Base, NewBase, Recipe
from toolkit.recipe.show import to_yaml, without_secrets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_FLOPS = 40e9  # what two cores of a laptop reach in float32; a GPU's figure is its own
GPU_FLOPS = 60e12
ADAPTER_PASSES, FULL_PASSES = 4, 6  # multiply-adds per weight and token: forward 2, gradients of inputs 2, of weights 2


@dataclass(frozen=True)
class Previewed:
    """What a run would stand on."""

    plan: Plan
    shape: Shape
    rows: Rows
    place: Place


def preview(recipe: Recipe, console: Console) -> Previewed | None:
    """Print the resolved recipe, the data report, one sample with its loss mask, and what the run will cost. None for
    a base from scratch, which is not looked at, and for an encoder, which has no loss mask.

    Raises what the run itself would raise before training: RecipeError, DataError, BaseError.
    """
    console.rule("recipe, every key")
    console.print(Text(to_yaml(without_secrets(recipe))))
    corpus = gather(recipe.data, recipe.train.seed, None)
    console.rule("data")
    _show_report(corpus, console)
    _show_manner(corpus, console)
    if isinstance(recipe.base, NewBase):
        console.print("A base from scratch learns its tokenizer first, so tokens are not counted yet.")
        return None
    assert isinstance(recipe.base, Base)  # several bases are chosen from before a run: refused when it is read
    if recipe.task == "classify" and is_encoder(recipe.base):
        _show_encoder(recipe, recipe.base, corpus, console)
        return None
    loaded, renderer, shape = _open(recipe, recipe.base)
    rows = render_rows(recipe, renderer, corpus)
    _show_lengths(rows, console)
    console.rule("one conversation: what is learned is underlined")
    console.print(mark_learned(loaded.tokenizer, rows.train[0]))
    console.rule("the run" if recipe.search is None else "one trial, with the recipe's own values")
    place = place_here()
    plan = make_plan(recipe, shape, place, max(len(row.input_ids) for row in rows.train))
    for name, value in estimate(recipe, plan, shape, rows, place.device).items():
        console.print(f"{name:<24}{value}")
    return Previewed(plan, shape, rows, place)


def _open(recipe: Recipe, base: Base) -> tuple[LoadedTokenizer, Renderer, Shape]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    loaded = load_tokenizer(base)
    renderer = Renderer(
        loaded.tokenizer, loaded.template, max_length(recipe, loaded.context), recipe.data.clean.too_long
    )
    code = base.trust_remote_code
    config = AutoConfig.from_pretrained(loaded.folder, trust_remote_code=code, local_files_only=True)
    make: Any = AutoModelForCausalLM.from_config  # not typed
    with torch.device("meta"):  # sizes without weights
        model = make(config, trust_remote_code=code)
    return loaded, renderer, shape_of(model, loaded.context)


def _show_encoder(recipe: Recipe, base: Base, corpus: Corpus, console: Console) -> None:
    """What an encoder would learn, and what that costs."""
    from toolkit.evaluate.classify import label_set
    from toolkit.fit.classify import label_plan, label_rows, refuse_misfits

    refuse_misfits(recipe)
    sketch = sketch_encoder(base, label_set(tuple(corpus.train)))
    found = label_rows(recipe, corpus, sketch, max_length(recipe, sketch.context))
    console.rule("the run: an encoder labels texts")
    console.print(f"{'labels':<24}{', '.join(sketch.labels)}", markup=False, soft_wrap=True)
    console.print(f"{'unknown to it':<24}{found.n_unknown / max(found.n_tokens, 1):.1%} of the tokens")
    texts = [Rendered(ids, [], []) for ids, _ in found.train]
    rows = Rows(texts, [], [], found.dropped, found.kept_talks, found.entry)
    place, shape = place_here(), shape_of(sketch.model, sketch.context)
    for name, value in estimate(recipe, label_plan(recipe, sketch, found, place), shape, rows, place.device).items():
        console.print(f"{name:<24}{value}")


def _show_report(corpus: Corpus, console: Console) -> None:
    report = corpus.report
    console.print(f"{report.loaded:,} conversations read, {report.kept:,} kept")
    for title, counts in (("dropped", report.dropped), ("mended", report.fixed), ("masked", report.masked)):
        for reason, number in sorted(counts.items(), key=lambda item: -item[1]):
            example = report.examples.get(reason, ("",))[0] if title == "dropped" else ""
            console.print(f"  {title} {number:,} {reason.replace('_', ' ')}  {example}", markup=False)
    sizes = {part: len(getattr(corpus, part)) for part in ("train", "valid", "test")}
    console.print(f"to learn from {sizes['train']:,}, to watch {sizes['valid']:,}, to judge by {sizes['test']:,}")


def _show_manner(corpus: Corpus, console: Console) -> None:
    """How spoken is what each role says, by a sample of what is learned from."""
    of_roles = manner_by_role(some_of(corpus.train, N_SCORED))
    said = [
        f"{role} {lang} {of.mean:.2f} ({100 * of.share:.0f} % of turns)"
        for role, by_language in of_roles.items()
        for lang, of in by_language.items()
        if lang != "all" and of.n
    ]
    if said:
        console.print(f"spoken, from 0 to 1: {', '.join(said)}")


def _show_lengths(rows: Rows, console: Console) -> None:
    table = Table(title="tokens", title_justify="left")
    for column in ("part", "rows", "median", "90 %", "longest", "tokens", "learned"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in ("train", "valid", "test"):
        some: list[Rendered] = getattr(rows, part)
        if some:
            lengths = sorted(len(row.input_ids) for row in some)
            total, learned = sum(lengths), sum(row.n_supervised for row in some)
            quantiles = (lengths[len(lengths) // 2], lengths[int(len(lengths) * 0.9)], lengths[-1])
            table.add_row(
                part, f"{len(some):,}", *(f"{n:,}" for n in quantiles), f"{total:,}", f"{100 * learned / total:.0f} %"
            )
    console.print(table)
    for reason, number in rows.dropped.items():
        console.print(f"  rendering: {number:,} {reason.replace('_', ' ')}")


def mark_learned(tokenizer: PreTrainedTokenizerBase, row: Rendered) -> Text:
    """The row as text, token by token; what is learned is underlined, so that the loss mask can be seen."""
    text = Text()
    for ids, is_learned in _runs(row):
        text.append(str(tokenizer.decode(ids)), style="bold underline green" if is_learned else "dim")
    return text


def _runs(row: Rendered) -> Iterator[tuple[list[int], bool]]:
    run: list[int] = []
    state = False
    for i, label in zip(row.input_ids, row.labels, strict=True):
        if run and (label != IGNORED) != state:
            yield run, state
            run = []
        state = label != IGNORED
        run.append(i)
    yield run, state


def estimate(recipe: Recipe, plan: Plan, shape: Shape, rows: Rows, device: str) -> dict[str, str]:
    """What the run will take, in words: sizes are counted, time and memory estimated."""
    seen = weigh(recipe, rows)
    per_epoch, steps = count_steps(len(seen), recipe)
    tokens = sum(len(row.input_ids) for row in seen) * steps / per_epoch
    is_cpu = device == "cpu"
    passes = FULL_PASSES if recipe.adapter.kind == "full" else ADAPTER_PASSES
    seconds = tokens * shape.parameters * passes / (CPU_FLOPS if is_cpu else GPU_FLOPS)
    weight = 4 if is_cpu else 2
    learned = shape.parameters * 12 if recipe.adapter.kind == "full" else 0  # gradient and two moments, float32
    held = shape.parameters * weight + learned
    longest = max(len(row.input_ids) for row in rows.train)
    activations = plan.micro_batch * activation_bytes(shape, longest, plan)
    names: Sequence[tuple[str, str]] = (
        ("device", f"{device}, {plan.precision}"),
        ("learning rate", f"{plan.learning_rate:g}"),
        ("longest row", f"{longest:,} of {plan.max_length:,} tokens"),
        ("batch", f"{recipe.train.batch_size} = {plan.micro_batch} at once x {plan.accumulation}"),
        ("packing", "yes" if plan.packing else "no"),
        ("steps", f"{steps:,} ({per_epoch:,} an epoch), {tokens:,.0f} tokens"),
        ("memory, estimated", f"{(held + activations) / 2**20:,.0f} MB, of it {activations / 2**20:,.0f} activations"),
        ("time, estimated", _span(seconds) + " of training, plus loading and judging"),
    )
    return dict(names)


def _span(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
