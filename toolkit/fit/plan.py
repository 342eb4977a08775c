"""What a recipe's `auto` means on this base and machine, and how an optimizer step is cut into micro batches.

Pure numbers: it is asked by `check` before anything is loaded and by the run itself. A plan is written into run.json
before step 1 and kept, so that a run that goes on takes the same steps.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from toolkit.errors import Problem, RecipeError
from toolkit.recipe.adapter import PREFIX_LIKE
from toolkit.recipe.model import Recipe, Train

SHORT = 20  # steps below which there is no warm-up
MAX_CONTEXT = 2048  # `max_length: auto` never asks for more
MEMORY_SHARE = 0.6  # of what is free goes to activations; the rest is left to optimizer state, allocator and neighbours
# Learning rates by adapter kind: (up to 30 M parameters, up to 600 M, above). Swept on spoken-mini, docs/log.md;
# larger bases follow the published practice of each method's paper.
LEARNING_RATES = {
    "lora": (3e-3, 1e-3, 2e-4),
    "prefix": (2e-1, 1e-2, 5e-3),
    "prefix through a projection": (3e-3, 1e-3, 5e-4),
    "reft": (2e-2, 4e-3, 1e-3),
    "embedding": (3e-3, 3e-3, 2e-3),
    "full": (1e-3, 1e-4, 2e-5),
    "new": (3e-3, 1e-3, 4e-4),
}
OTHER_KINDS = (5e-3, 2e-3, 1e-3)


@dataclass(frozen=True)
class Shape:
    """What planning has to know of a base: sizes as its config gives them, in tokens and parameters."""

    parameters: int
    hidden: int
    layers: int
    vocab: int
    context: int


@dataclass(frozen=True)
class Place:
    """Where the run happens: the device, how many processes share the step, and how many bytes are free for each."""

    device: str
    world_size: int
    free_bytes: int
    has_bf16: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything `auto` became. Batches in conversations, lengths in tokens."""

    learning_rate: float
    max_length: int
    micro_batch: int
    accumulation: int
    packing: bool
    precision: str
    activation_checkpointing: bool

    def facts(self) -> dict[str, Any]:
        """The plan as JSON."""
        return asdict(self)


def learning_rate(recipe: Recipe, parameters: int) -> float:
    """The recipe's learning rate, or the default of the adapter kind for a base of this size."""
    if recipe.train.learning_rate != "auto":
        return float(recipe.train.learning_rate)
    kind = "new" if is_new(recipe) else recipe.adapter.kind
    if getattr(recipe.adapter, "projection", False):
        kind = "prefix through a projection"
    small, middle, large = LEARNING_RATES.get(kind, OTHER_KINDS)
    return small if parameters <= 30e6 else middle if parameters <= 600e6 else large


def is_new(recipe: Recipe) -> bool:
    """Whether the recipe makes its base from scratch."""
    return getattr(recipe.base, "new", None) is not None


def max_length(recipe: Recipe, context: int) -> int:
    """The longest conversation in tokens: the recipe's, or the base's trained context, at most 2048.

    Raises RecipeError for one that the base does not hold.
    """
    asked = recipe.train.max_length
    if asked != "auto" and asked > context:
        says = f"{asked} is more than the {context} tokens this base was trained on. Take {context}, or a longer base."
        raise RecipeError(recipe.name, [Problem("train.max_length", says)])
    return min(context, MAX_CONTEXT) if asked == "auto" else int(asked)


def make_plan(recipe: Recipe, shape: Shape, place: Place, longest: int) -> Plan:
    """Resolve every `auto` for rows of at most `longest` tokens.

    Raises RecipeError where the numbers contradict each other (a batch that the processes cannot share evenly).
    """
    train = recipe.train
    if train.batch_size % place.world_size:
        says = f"{train.batch_size} a step cannot be shared by {place.world_size} processes. Make it a multiple."
        raise RecipeError(recipe.name, [Problem("train.batch_size", says)])
    share = train.batch_size // place.world_size
    precision = train.precision if train.precision != "auto" else ("bf16" if place.has_bf16 else "fp32")
    checkpointing = train.activation_checkpointing
    plan = Plan(
        learning_rate=learning_rate(recipe, shape.parameters),
        max_length=max_length(recipe, shape.context),
        micro_batch=share,
        accumulation=1,
        packing=recipe.adapter.kind not in PREFIX_LIKE if train.packing == "auto" else bool(train.packing),
        precision=precision,
        activation_checkpointing=shape.parameters > 600e6 and _may_checkpoint(recipe, place)
        if checkpointing == "auto"
        else bool(checkpointing),
    )
    if train.micro_batch != "auto":
        return with_micro_batch(plan, int(train.micro_batch), share, recipe.name)
    per_row = activation_bytes(shape, longest, plan)
    fits = max(1, int(place.free_bytes * MEMORY_SHARE // max(per_row, 1)))
    return with_micro_batch(plan, largest_divisor(share, fits), share, recipe.name)


def _may_checkpoint(recipe: Recipe, place: Place) -> bool:
    return place.device != "cpu" and recipe.adapter.kind not in PREFIX_LIKE


def with_micro_batch(plan: Plan, micro: int, share: int, source: str) -> Plan:
    """The same plan with another micro batch; the optimizer step stays what it was."""
    if share % micro:
        says = f"{micro} does not divide the {share} conversations of a step. Take {largest_divisor(share, micro)}."
        raise RecipeError(source, [Problem("train.micro_batch", says)])
    return replace(plan, micro_batch=micro, accumulation=share // micro)


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`."""
    return max(d for d in range(1, number + 1) if number % d == 0 and (d <= at_most or d == 1))


def activation_bytes(shape: Shape, tokens: int, plan: Plan) -> int:
    """Estimated bytes of activations that one row keeps for its backward pass, head included.

    Counts about 34 hidden-sized tensors a layer (attention, MLP, norms; Korthikanti et al., arXiv 2205.05198, in
    elements), one tensor a layer when checkpointing, the score matrix of an attention without a fused kernel, and
    two tensors of logits.
    """
    size = 4 if plan.precision == "fp32" else 2
    per_layer = 1 if plan.activation_checkpointing else 34
    heads = max(1, shape.hidden // 64)
    attention = 0 if plan.activation_checkpointing else 2 * heads * tokens * tokens
    return size * (shape.layers * (per_layer * tokens * shape.hidden + attention)) + 2 * 4 * tokens * shape.vocab


def count_steps(n_rows: int, recipe: Recipe) -> tuple[int, int]:
    """Optimizer steps an epoch, and in the whole run."""
    per_epoch = max(1, math.ceil(n_rows / recipe.train.batch_size))
    whole = math.ceil(per_epoch * recipe.train.epochs)
    return per_epoch, whole if recipe.train.max_steps is None else recipe.train.max_steps


def warmup_steps(train: Train, total: int) -> int:
    """Steps in which the learning rate rises; none in a short run, whose first step would learn nothing."""
    return math.ceil(train.warmup_ratio * total) if total >= SHORT else 0


def is_judged(train: Train, total: int, step: int) -> bool:
    """Whether a held-out loss after this step tells of a trial: not while its learning rate still rises."""
    return step > warmup_steps(train, total)


def evaluation_steps(per_epoch: int, total: int, every: float) -> tuple[int, ...]:
    """After which steps the held-out loss is measured: every `every` epochs, and always after the last."""
    if every <= 0:
        return ()
    marks = {max(1, round(i * every * per_epoch)) for i in range(1, int(total / (every * per_epoch)) + 2)}
    return tuple(sorted({m for m in marks if m < total} | {total}))
