"""The sum of several adapters of one kind as one adapter of that kind: lora, reft, embedding.

Of a prefix there is none: keys and values meet in a softmax, so a sum of prefixes does not do the sum of what they do.
"""

# I features in, O features out, R rank, H hidden, N token ids of one member, U token ids of any.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from toolkit.adapters.reft import orthonormal
from toolkit.combine import lowrank
from toolkit.combine.lowrank import Part, Update
from toolkit.combine.sparse import SPARSE, draw_of, dropped, trimmed
from toolkit.errors import AdapterError
from toolkit.stack.adapter import Adapter
from toolkit.stack.embedding import DELTA, IDS
from toolkit.stack.lora import PART, PREFIX, scale_of

TARGETS = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")
OTHER_BASE = "Merge adapters of one base."


@dataclass(frozen=True)
class Member:
    """An adapter and how much of it goes in."""

    name: str
    adapter: Adapter
    weight: float


@dataclass(frozen=True)
class How:
    """A method and what it was asked for; rank None: the method's own."""

    method: str
    rank: int | None
    density: float
    seed: int


@dataclass(frozen=True)
class Made:
    """A merged adapter and, for each layer, how far it is from the exact sum, and how long that is."""

    adapter: Adapter
    off: Mapping[str, tuple[float, float]]
    told: tuple[str, ...] = ()


Sum = Callable[[Sequence[Member], How], Made]


def sum_lora(members: Sequence[Member], how: How) -> Made:
    """Plain LoRA of one rank and scale 1, which opens in PEFT; layers that only some have get the sum over those.

    Raises: AdapterError for layers of different shapes, and for different ranks where the method takes one.
    """
    layers = _layers(members)
    active = {name: kept for name, parts in layers.items() if (kept := [part for part in parts if part.weight])}
    if how.method == "linear":
        _refuse_unequal_ranks(active)
    rank, told = _rank_of(active, how)
    tensors: dict[str, Tensor] = {}
    off: dict[str, tuple[float, float]] = {}
    for layer, kept_parts in active.items():
        parts = [replace(part, a_RI=part.a_RI.double(), b_OR=part.b_OR.double()) for part in kept_parts]
        found = _update(layer, parts, how, rank)
        stored = Update(found.a_RI.float(), found.b_OR.float())
        whole = lowrank.exact(parts)
        rounded = Update(stored.a_RI.double(), stored.b_OR.double())
        off[layer] = _off(lowrank.distance(rounded, whole), lowrank.norm(whole), _size(parts))
        stored = lowrank.padded(stored, rank)
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = stored.a_RI.contiguous()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = stored.b_OR.contiguous()
    return Made(Adapter("lora", tensors, _lora_config(members, list(active), rank)), off, told)


def sum_reft(members: Sequence[Member], how: How) -> Made:
    """LoReFT whose edit of each layer is the weighted sum of the members' edits of the same hidden state.

    An edit is R^T ((W - R) h + b): the sum stacks the rows of R, W - R and b. A QR makes the stacked rotation
    orthonormal again and moves what it takes off into W - R and b, so the sum is a LoReFT, of at most the members'
    ranks together. Raises: AdapterError for members of other bases.
    """
    _refuse_other_shapes(members, ("hidden", "n_layers"))
    layers = _edits(members)
    active = {name: kept for name, parts in layers.items() if (kept := [part for part in parts if part.weight])}
    hidden = next(iter(active.values()))[0].b_OR.shape[0]
    rank = min(hidden, max(sum(part.rank for part in parts) for parts in active.values()))
    tensors: dict[str, Tensor] = {}
    off: dict[str, tuple[float, float]] = {}
    for layer, parts in active.items():
        whole = lowrank.exact(parts)
        q_HH, turn_HR = torch.linalg.qr(whole.b_OR, mode="complete" if whole.rank < rank else "reduced")
        rotation_RH = q_HH[:, :rank].mT.float().contiguous()
        moved_RI = (turn_HR[:rank] @ whole.a_RI).float()
        weight_RH = rotation_RH + moved_RI[:, :hidden]
        made = torch.cat([weight_RH - rotation_RH, moved_RI[:, hidden:]], 1)
        rounded = Update(made.double(), rotation_RH.mT.double())
        off[layer] = _off(lowrank.distance(rounded, whole), lowrank.norm(whole), _size(parts))
        tensors[f"{layer}.rotation"] = rotation_RH
        tensors[f"{layer}.weight"] = weight_RH
        tensors[f"{layer}.bias"] = moved_RI[:, hidden].contiguous()
    numbers = sorted(int(layer.split(".")[1]) for layer in active)
    first = members[0].adapter.config
    chosen = "all" if len(numbers) == first.get("n_layers") else numbers
    config = {**first, "rank": rank, "layers": chosen, "dropout": 0.0}
    return Made(Adapter("reft", tensors, config), off)


def sum_embedding(members: Sequence[Member], how: How) -> Made:
    """Deltas of all the members' tokens; a token that a member has not learnt is 0 there.

    Each delta is trimmed or dropped by itself, so `density` is a share of its own numbers. Raises: AdapterError for
    members of other bases.
    """
    _refuse_other_shapes(members, ("vocabulary", "hidden"))
    for member in members:
        ids, delta = (member.adapter.tensors.get(name) for name in (IDS, DELTA))
        if ids is None or delta is None or delta.dim() != 2 or ids.shape != delta.shape[:1]:
            raise AdapterError(f"merge: {member.name} does not hold a delta for each of its tokens. Copy it again.")
    _refuse_different({member.name: member.adapter.tensors[DELTA].shape[1] for member in members}, "width")
    active = [member for member in members if member.weight]
    weights = [member.weight for member in active]
    ids_U = torch.cat([member.adapter.tensors[IDS] for member in active]).unique()  # type: ignore[no-untyped-call]
    plain: list[Tensor] = []
    sparse: list[Tensor] = []
    for member in active:
        delta_NH = member.adapter.tensors[DELTA].detach().double()
        thin_NH = delta_NH
        if how.method in ("ties", "magnitude_prune"):
            thin_NH = trimmed(delta_NH, how.density)
        elif how.method in ("dare_linear", "dare_ties"):
            thin_NH = dropped(delta_NH, how.density, draw_of(how.seed, member.name, DELTA))
        rows_N = torch.searchsorted(ids_U, member.adapter.tensors[IDS])
        for kept, table_NH in ((plain, delta_NH), (sparse, thin_NH)):
            kept.append(table_NH.new_zeros(len(ids_U), table_NH.shape[1]).index_copy(0, rows_N, table_NH))
    whole_UH = SPARSE["magnitude_prune"](plain, weights, 1.0, [])
    found_UH = SPARSE[how.method](sparse, weights, 1.0, [0] * len(active)) if how.method in SPARSE else whole_UH
    delta_UH = found_UH.float()
    size = sum(abs(weight) * float(delta.norm()) for weight, delta in zip(weights, plain, strict=True))
    off = {DELTA: _off(float(torch.dist(delta_UH.double(), whole_UH)), float(whole_UH.norm()), size)}
    config = {**members[0].adapter.config, "n_tokens": len(ids_U)}
    return Made(Adapter("embedding", {IDS: ids_U, DELTA: delta_UH}, config), off)


SUMS: dict[str, Sum] = {"lora": sum_lora, "reft": sum_reft, "embedding": sum_embedding}


def _layers(members: Sequence[Member]) -> dict[str, list[Part]]:
    """What each member brings to each layer, those of weight 0 too; refused where shapes differ."""
    layers: dict[str, list[Part]] = {}
    for member in members:
        halves: dict[str, dict[str, Tensor]] = {}
        for name, tensor in member.adapter.tensors.items():
            found = PART.match(name.removeprefix(PREFIX))
            if found is None or tensor.dim() != 2:
                raise AdapterError(
                    f"merge: {member.name} holds {name}, which is no LoRA of a linear layer. Only such updates add up."
                )
            halves.setdefault(found["module"], {})[found["part"]] = tensor.detach()
        for module, pair in halves.items():
            if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                raise AdapterError(
                    f"merge: A and B of {module} in {member.name} do not fit each other. Copy the adapter again."
                )
            scale = scale_of(member.adapter.config, module, pair["A"].shape[0])
            layers.setdefault(module, []).append(Part(member.name, member.weight, scale, pair["A"], pair["B"]))
    for module, parts in layers.items():
        shapes = {part.member: f"{part.a_RI.shape[1]} to {part.b_OR.shape[0]}" for part in parts}
        _refuse_different(shapes, f"the shape of {module}")
    return layers


def _edits(members: Sequence[Member]) -> dict[str, list[Part]]:
    """Each edit as a low-rank update of (h, 1): rows (W - R | b), columns R^T."""
    layers: dict[str, list[Part]] = {}
    for member in members:
        tensors = member.adapter.tensors
        for layer in sorted({name.rpartition(".")[0] for name in tensors}):
            if any(f"{layer}.{part}" not in tensors for part in ("rotation", "weight", "bias")):
                raise AdapterError(f"merge: the edit {layer} of {member.name} is not whole. Copy the adapter again.")
            rotation_RH = tensors[f"{layer}.rotation"].detach()
            rotation_RH = (orthonormal(rotation_RH) if member.adapter.is_raw else rotation_RH).double()
            moved_RH = tensors[f"{layer}.weight"].detach().double() - rotation_RH
            rows_RI = torch.cat([moved_RH, tensors[f"{layer}.bias"].detach().double()[:, None]], 1)
            layers.setdefault(layer, []).append(Part(member.name, member.weight, 1.0, rows_RI, rotation_RH.mT))
    _refuse_different({part.member: part.b_OR.shape[0] for parts in layers.values() for part in parts}, "hidden size")
    return layers


def _size(parts: Sequence[Part]) -> float:
    return sum(abs(part.amount) * lowrank.norm(Update(part.a_RI, part.b_OR)) for part in parts)


def _off(distance: float, norm: float, size: float) -> tuple[float, float]:
    """Distance and norm, where members that cancel leave nothing but rounding both 0; `size`: of all of them apart."""
    if norm > 1e-12 * size:
        return distance, norm
    return (distance if distance > 1e-6 * size else 0.0), 0.0


def _update(layer: str, parts: Sequence[Part], how: How, rank: int) -> Update:
    if how.method == "exact":
        return lowrank.exact(parts)
    if how.method == "linear":
        return lowrank.linear(parts)
    keeps_all = how.density >= 1.0 and (how.method in ("dare_linear", "magnitude_prune") or len(parts) == 1)
    if how.method == "svd" or keeps_all:
        return lowrank.svd(parts, rank)
    draws = [draw_of(how.seed, part.member, layer) for part in parts]
    weights = [part.weight for part in parts]
    merged_OI = SPARSE[how.method]([part.full_OI() for part in parts], weights, how.density, draws)
    return lowrank.nearest(merged_OI, rank)


def _rank_of(layers: Mapping[str, Sequence[Part]], how: How) -> tuple[int, tuple[str, ...]]:
    """The rank of the result, and what was done to the one asked for."""
    together = max(sum(part.rank for part in parts) for parts in layers.values())
    largest = max(part.rank for parts in layers.values() for part in parts)
    if how.method in ("exact", "linear"):
        return (together if how.method == "exact" else largest), ()
    widest = max(min(parts[0].a_RI.shape[1], parts[0].b_OR.shape[0]) for parts in layers.values())
    most = min(together, widest) if how.method == "svd" else widest
    wanted = how.rank or (largest if how.method == "svd" else together)
    if wanted <= most:
        return wanted, ()
    return most, (f"Rank {wanted} can hold no more than {most} does; {most} is used.",) if how.rank else ()


def _refuse_unequal_ranks(layers: Mapping[str, Sequence[Part]]) -> None:
    ranks = {part.member: part.rank for parts in layers.values() for part in parts}
    if (
        any(part.rank != ranks[part.member] for parts in layers.values() for part in parts)
        or len(set(ranks.values())) > 1
    ):
        found = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        raise AdapterError(
            f"merge: linear adds A to A and B to B, so it takes members of one rank ({found}). Use exact, or svd "
            "with a rank."
        )


def _refuse_other_shapes(members: Sequence[Member], keys: Sequence[str]) -> None:
    for key in keys:
        _refuse_different({member.name: member.adapter.config.get(key) for member in members}, key)


def _refuse_different(found: Mapping[str, Any], what: str) -> None:
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name} {value}" for name, value in found.items())
        raise AdapterError(f"merge: the members' bases differ in {what} ({said}). {OTHER_BASE}")


def _lora_config(members: Sequence[Member], layers: Sequence[str], rank: int) -> dict[str, Any]:
    """PEFT's config of the merged adapter: that of the first member, with the layers named where members differ."""
    configs = [member.adapter.config for member in members if member.weight]
    first = dict(configs[0])
    said = [[_unordered(config.get(key)) for key in TARGETS] for config in configs]
    if any(one != said[0] for one in said) or not isinstance(first.get("target_modules"), list | set | tuple):
        first.update(dict.fromkeys(TARGETS), target_modules=sorted(layers))
    return first | {
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }


def _unordered(value: Any) -> Any:
    return frozenset(value) if isinstance(value, list | set | tuple) else value
