"""What a recipe cannot mean: sections that are right one by one and contradict each other.

Most of it is silently wrong elsewhere, so it is refused here; what is known of it was measured (peft 0.21.2, trl 1.16).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from toolkit.recipe.adapter import PREFIX_LIKE, SET_BY_US, Full, Lora, PeftKind, Prefix
from toolkit.recipe.model import CLASSIFY_METRICS, Base, Columns, Labels, NewBase, Recipe
from toolkit.recipe.tree import Key


@dataclass(frozen=True)
class Clash:
    """A contradiction: the key to change (dotted, or its parts where one holds a dot), what to say, and the other keys
    it hangs on.
    """

    at: str | Key
    says: str
    needs: tuple[str | Key, ...] = ()


def clashes(recipe: Recipe) -> Iterator[Clash]:
    """Every contradiction in a recipe whose sections are right one by one."""
    yield from _adapter_against_training(recipe)
    yield from _adapter_against_base(recipe)
    yield from _adapter_alone(recipe)
    yield from _new_base(recipe)
    yield from _data(recipe)
    yield from _training(recipe)


def _adapter_against_training(recipe: Recipe) -> Iterator[Clash]:
    kind, train = recipe.adapter.kind, recipe.train
    if kind in PREFIX_LIKE and train.packing is True:
        says = f"a {kind} adapter leads only the first of several packed conversations. Write packing: false, or auto"
        yield Clash("train.packing", says, ("adapter.kind",))
    if kind == "prefix" and train.activation_checkpointing is True:
        says = "a prefix lives in the cache, which checkpointing drops. Write activation_checkpointing: false, or auto"
        yield Clash("train.activation_checkpointing", says, ("adapter.kind",))
    if train.optimizer == "muon" and not isinstance(recipe.adapter, Full):
        says = f"muon is for whole weight matrices (adapter: {{kind: full}}), not for {kind}. Write optimizer: adamw"
        yield Clash("train.optimizer", says, ("adapter.kind",))


def _adapter_against_base(recipe: Recipe) -> Iterator[Clash]:
    if not isinstance(recipe.base, Base) or recipe.base.quantize == "none":
        return
    if isinstance(recipe.adapter, Full):
        says = "weights in 4 bits cannot learn, so full training needs quantize: none. Or choose adapter: {kind: lora}"
        yield Clash("base.quantize", says, ("adapter.kind",))
    if isinstance(recipe.adapter, Lora) and recipe.adapter.init == "pissa":
        says = "pissa moves weights out of the base, which 4 bits cannot give back. Write init: default"
        yield Clash("adapter.init", says, ("base.quantize", "adapter.kind"))


def _adapter_alone(recipe: Recipe) -> Iterator[Clash]:
    adapter = recipe.adapter
    if isinstance(adapter, Prefix) and adapter.init_text and adapter.projection:
        says = "a prefix that starts from a text has no projection. Remove init_text, or write projection: false"
        yield Clash("adapter.init_text", says, ("adapter.projection", "adapter.kind"))
    if isinstance(adapter, Lora) and not isinstance(adapter.targets, str):
        yield from _layer_names("adapter.targets", adapter.targets)
    if isinstance(adapter, PeftKind):
        wanted = adapter.options.get("target_modules")
        names = (wanted,) if isinstance(wanted, str) else tuple(wanted) if isinstance(wanted, list) else ()
        yield from _layer_names("adapter.options.target_modules", names)
        for name in sorted(SET_BY_US & set(adapter.options)):
            yield Clash(f"adapter.options.{name}", "is filled in by the run. Remove it", ("adapter.kind",))


def _layer_names(at: str, names: tuple[object, ...]) -> Iterator[Clash]:
    if any(isinstance(name, str) and name.split(".")[-1] == "lm_head" for name in names):
        yield Clash(at, "the head (lm_head) takes no adapter: tied bases would lose it when saved. Leave lm_head out")
    if len({str(name) for name in names}) < len(names):
        yield Clash(at, "names a layer twice. Name it once")


def _new_base(recipe: Recipe) -> Iterator[Clash]:
    if not isinstance(recipe.base, NewBase):
        return
    shape = recipe.base.new
    if not isinstance(recipe.adapter, Full):
        says = "a base made from scratch learns all its weights. Write adapter: {kind: full}"
        yield Clash("base.new", says, ("adapter.kind",))
    if shape.hidden % (2 * shape.heads):
        width = -(-shape.hidden // (2 * shape.heads)) * 2 * shape.heads
        says = f"{shape.heads} heads do not divide hidden {shape.hidden} into even widths. Write hidden: {width}"
        yield Clash("base.new.hidden", says, ("base.new.heads",))
    length = recipe.train.max_length
    if isinstance(length, int) and length > shape.context:
        yield Clash(
            "train.max_length", f"is over the context of the new base ({shape.context}). Lower it", ("base.new",)
        )


def _data(recipe: Recipe) -> Iterator[Clash]:
    data, task = recipe.data, recipe.task
    labels = isinstance(data.format, Labels)
    if task == "classify" and not labels:
        says = "task: classify needs labels. Write format: {kind: labels, text: COLUMN, label: COLUMN}"
        yield Clash("data.format", says, ("task",))
    if task != "classify" and labels:
        yield Clash("task", "labels are learned by task: classify. Write it, or use columns", ("data.format",))
    if task == "text2text" and data.format == "text":
        yield Clash("data.format", "running text has no answers. Write task: chat, or use columns", ("task",))
    if data.format == "text" and data.system is not None:
        yield Clash("data.system", "running text (format: text) has no system turn. Remove it", ("data.format",))
    if isinstance(data.format, Columns) and data.format.user == data.format.assistant:
        yield Clash("data.format.assistant", "names the column of user again. Name the answer's")
    if isinstance(data.format, Labels) and data.format.text == data.format.label:
        yield Clash("data.format.label", "names the column of text again. Name the label's")
    shares = [share for share in (data.valid, data.test) if not isinstance(share, tuple)]
    if sum(shares) >= 1:
        yield Clash("data.valid", f"valid and test take all of it ({sum(shares):g}). Lower one", ("data.test",))
    classified = [name for name in recipe.evaluate.metrics if name in CLASSIFY_METRICS]
    if classified and task != "classify":
        says = f"{', '.join(classified)} count labels, which only task: classify has. Remove them"
        yield Clash("evaluate.metrics", says, ("task",))


def _training(recipe: Recipe) -> Iterator[Clash]:
    train = recipe.train
    if isinstance(train.micro_batch, int) and train.micro_batch > train.batch_size:
        says = f"is over batch_size ({train.batch_size}), all conversations of a step. Lower it, or write auto"
        yield Clash("train.micro_batch", says, ("train.batch_size",))
    # The usual 0.25 may be longer than a short trial run; the end is always evaluated.
    if train.max_steps is None and train.evaluate_every > max(train.epochs, 0.25):
        says = f"{train.evaluate_every:g} epochs are more than the run has ({train.epochs:g}). Lower it"
        yield Clash("train.evaluate_every", says, ("train.epochs", "train.max_steps"))
