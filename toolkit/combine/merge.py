"""Several adapters with weights into one: the exact sum of what they do (the default), or one of its relatives.

Scales are worked out for each layer (alpha, rank, rank-stabilised or not, patterns), so members may differ in all of
them. ties, dare_linear, dare_ties and magnitude_prune work on whole updates, as their papers do, and are then brought
back to a rank; so they need no equal ranks either.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.combine.contract import Given, numbers
from toolkit.combine.methods import method_named
from toolkit.combine.summed import OTHER_BASE, SUMS, How, Member
from toolkit.errors import AdapterError, InputError, Problem
from toolkit.recipe.combine import MERGES, SPARSE
from toolkit.stack.adapter import CHANGED_BASE, PEFT_REFUSALS, Adapter

DENSITY = 0.5  # of the methods that drop numbers, where none is given
MORE_REFUSALS = ("use_bdlora", "velora_config", "kasa_config", "monteclora_config")
INSTEAD = "Combine them with mix or vote instead, which need nothing of their weights."


@dataclass(frozen=True)
class Merged:
    """What came out of a merge.

    adapter: of the members' kind, on the CPU in float32. weights: as they were used. error: the Frobenius norm of the
    difference from the exact sum, over that of the sum, all layers together; `errors` for each layer. Of an exact merge
    it is what rounding to float32 leaves. told: what was done to what was asked for.
    """

    adapter: Adapter
    method: str
    weights: Mapping[str, float]
    error: float
    errors: Mapping[str, float]
    told: tuple[str, ...] = ()


def merge(
    adapters: Mapping[str, Adapter],
    weights: Given = None,
    *,
    method: str = "exact",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Merged:
    """One adapter that does the weighted sum of what several do; None: equal weights that sum to 1, others as given.

    Negative weights take away what an adapter does. A member of weight 0 leaves no trace. rank: of svd (default: the
    largest of the members') and of the methods that drop numbers (default: the sum of the members'). density: the share
    of numbers that those keep; `seed` says which, for dare. One adapter at weight 1 is itself by every method (density
    1 where numbers are dropped).
    Raises: InputError for weights, rank, density or a method that there is not; AdapterError for members of different
    kinds or bases, kinds and methods that have no sum, special forms of LoRA, and ranks that a method cannot take.
    Cost: exact and linear copy; svd: see `lowrank.svd`; the others make each layer's updates whole, one layer at a
    time, and decompose them.
    """
    if not adapters:
        raise AdapterError("merge: no adapter is given. Name at least one.")
    values = numbers(tuple(adapters), weights)
    how = _checked(method, rank, density, seed)
    kind = _one_kind(adapters, method)
    _refuse_other_bases(adapters)
    members = [Member(name, adapter, value) for (name, adapter), value in zip(adapters.items(), values, strict=True)]
    made = SUMS[kind](members, how)
    told = list(made.told)
    total = math.fsum(values)
    if abs(total - 1.0) > 1e-9:
        told.append(f"The weights sum to {total:g}; a merge uses them as they are.")
    left_out = [member.name for member in members if not member.weight]
    if left_out:
        told.append(f"{', '.join(left_out)}: weight 0, so left out.")
    off = math.hypot(*(distance for distance, _ in made.off.values()))
    return Merged(
        adapter=made.adapter,
        method=method,
        weights=dict(zip(adapters, values, strict=True)),
        error=_relative(off, math.hypot(*(norm for _, norm in made.off.values()))),
        errors={layer: _relative(*pair) for layer, pair in made.off.items()},
        told=tuple(told),
    )


def _relative(off: float, norm: float) -> float:
    """off / norm; where the sum is nothing: 0 if so is the difference, else infinite."""
    if norm > 0:
        return off / norm
    return math.inf if off > 0 else 0.0


def _checked(method: str, rank: int | None, density: float | None, seed: int) -> How:
    problems = []
    method_named("merge", method)
    if rank is not None:
        if method in ("exact", "linear"):
            own = "the sum of the members' ranks" if method == "exact" else "the members' rank"
            problems.append(Problem("rank", f"{method} has {own}. Leave it out, or use svd."))
        elif isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            problems.append(Problem("rank", f"{rank!r} is no rank. Give a whole number of at least 1."))
    if density is not None:
        if method not in SPARSE:
            problems.append(Problem("density", f"{method} drops nothing. Leave it out, or use {', '.join(SPARSE)}."))
        elif isinstance(density, bool) or not isinstance(density, int | float) or not 0.0 < density <= 1.0:
            problems.append(Problem("density", f"{density!r} is no share. Give one above 0, at most 1 (all stay)."))
    if problems:
        raise InputError("merge", problems)
    return How(method, rank, DENSITY if density is None else float(density), seed)


def _one_kind(adapters: Mapping[str, Adapter], method: str) -> str:
    """The kind of all the adapters. Raises: AdapterError where they have no sum."""
    kinds = {name: adapter.kind for name, adapter in adapters.items()}
    kind = next(iter(kinds.values()))
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{name} {one}" for name, one in kinds.items())
        raise AdapterError(f"merge: adapters of different kinds have no sum ({found}). {INSTEAD}")
    if kind == "prefix":
        raise AdapterError(
            "merge: prefixes have no sum: keys and values meet in a softmax, so their sum does not do the sum of what "
            f"they do. {INSTEAD}"
        )
    if kind not in SUMS:
        raise AdapterError(f"merge: adapters of kind {kind} have no sum. Use {', '.join(SUMS)}. {INSTEAD}")
    if method not in MERGES[kind]:
        raise AdapterError(
            f"merge: {method} is not defined for adapters of kind {kind}. Use {' or '.join(MERGES[kind])}."
        )
    for name, adapter in adapters.items():
        _refuse_unfit(name, adapter)
    return kind


def _refuse_unfit(name: str, adapter: Adapter) -> None:
    if not adapter.tensors:
        raise AdapterError(f"merge: {name} holds no tensor. Copy the adapter again.")
    odd = [key for key, tensor in adapter.tensors.items() if not bool(tensor.isfinite().all())]
    if odd:
        raise AdapterError(f"merge: {odd[0]} of {name} holds values that are not finite. Use an earlier checkpoint.")
    if adapter.kind != "lora":
        return
    config = adapter.config
    found = [f"{key}: {why}" for key, plain, why in PEFT_REFUSALS if config.get(key) and config[key] not in plain]
    found += [f"{key}: its update is no plain product" for key in MORE_REFUSALS if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        found.append(f"init_lora_weights: a {start} start changed the base's own weights")
    if found:
        raise AdapterError(
            f"merge: {name} does more than add an update to linear layers ({'; '.join(found)}), so a sum of updates "
            f"would be silently wrong. Train it as plain LoRA. {INSTEAD}"
        )


def _refuse_other_bases(adapters: Mapping[str, Adapter]) -> None:
    """By the hash that folders of ours carry; what has none is told by its shapes."""
    hashes = {
        name: str(adapter.config["base_hash"]) for name, adapter in adapters.items() if adapter.config.get("base_hash")
    }
    if len(set(hashes.values())) > 1:
        found = ", ".join(f"{name} {one[:12]}" for name, one in hashes.items())
        raise AdapterError(f"merge: the members were trained on different bases ({found}). {OTHER_BASE}")
