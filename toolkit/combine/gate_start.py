"""Gates that nobody has trained: one that is to learn, one that stays constant, and Arrow's, read off the experts."""

# K experts, H hidden, D width of the gate's network, I features of what is read, R rank.

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from toolkit.adapters import anatomy
from toolkit.combine.gate import PARTS, PRIOR, Gate, Per, hashes_of, networks_for, refuse_unfit
from toolkit.errors import AdapterError, InputError, Problem
from toolkit.stack.adapter import Adapter
from toolkit.stack.lora import PART, PREFIX, scale_of
from toolkit.stack.shelf import holding_layer, layer_numbers
from toolkit.stack.stack import Stack

NEVER = -1e4  # a logit whose softmax is exactly 0 in float32
TIE_BREAK = 0.1  # of a gate that keeps the largest: without it every token would start with the same experts


def new_gate(
    stack: Stack,
    experts: Sequence[str],
    *,
    per: Per = "model",
    hidden: int = 32,
    top_k: int | None = None,
    seed: int = 0,
) -> Gate:
    """A gate that has learnt nothing: nearly the same weight for every expert (exactly, without `top_k`).

    Raises: AdapterError for experts that the stack lacks or that have no weights per token, or a base of one layer
    under per: model; InputError for fewer experts than `top_k`, or numbers below 1.
    """
    refuse_unfit(stack, experts)
    _refuse_numbers(per, hidden, top_k, len(experts))
    n_layers, n_features = len(anatomy.decoder_layers(stack.base)), anatomy.hidden_size(stack.base)
    noise = torch.Generator().manual_seed(seed)
    tensors = {PRIOR: torch.zeros(len(experts))}
    for number in networks_for(per, n_layers):
        down_DH = torch.randn(hidden, n_features, generator=noise) / n_features**0.5
        up_KD = torch.randn(len(experts), hidden, generator=noise) / hidden**0.5
        values = (
            down_DH,
            torch.zeros(hidden),
            up_KD * (0.0 if top_k is None else TIE_BREAK),
            torch.zeros(len(experts)),
        )
        tensors |= {f"layers.{number}.{part}": value for part, value in zip(PARTS["learned"], values, strict=True)}
    return Gate(tuple(experts), per, "learned", n_layers, n_features, tensors, top_k, hashes_of(stack, experts))


def constant_gate(stack: Stack, experts: Mapping[str, float], *, per: Per = "model") -> Gate:
    """A gate that gives every token the same weights, made to sum to 1: what a learnt one has to beat.

    Raises: AdapterError as `new_gate` does; InputError for weights that are negative, no numbers, or all 0.
    """
    given = torch.tensor(list(experts.values()), dtype=torch.float64)
    if not len(given) or not bool(given.isfinite().all()) or bool((given < 0).any()) or not float(given.sum()):
        says = f"{dict(experts)} are no shares. Give numbers of 0 or more whose sum is above 0."
        raise InputError("weights", [Problem("", says)])
    gate = new_gate(stack, tuple(experts), per=per, hidden=1)
    logits_K = (given / given.sum()).log().clamp(min=NEVER).float()
    set_to = {name: logits_K.clone() for name in gate.tensors if name == PRIOR or name.endswith(".up.bias")}
    return Gate(**{**vars(gate), "tensors": {**gate.tensors, **set_to}})


def arrow_gate(stack: Stack, experts: Sequence[str], *, per: Per = "model", top_k: int | None = None) -> Gate:
    """Arrow's gate (arXiv 2405.11157), for lora experts: softmax over |x . v|, v the top right singular vector of B A.

    The paper routes in every linear layer by itself. Here a decoder layer has one set of weights, so v is that of all
    updates which read the same x, one above the other: what the first adapted linear layer of the decoder layer reads
    (its queries, keys and values, as a rule). per: model takes the weights of layer 1 for all layers above.
    Cost: a forward pass of one token, and an SVD of (sum of ranks) x I for each expert and layer.
    Raises: AdapterError for an expert that is no lora, or whose update of such a layer is missing or zero; InputError
    as `new_gate` does.
    """
    refuse_unfit(stack, experts)
    _refuse_numbers(per, 1, top_k, len(experts))
    n_layers = len(anatomy.decoder_layers(stack.base))
    updates = {name: _updates(name, stack.adapter(name)) for name in experts}
    tensors: dict[str, Tensor] = {PRIOR: torch.zeros(len(experts))}
    reads: dict[int, str] = {}
    adapted = {module for own in updates.values() for module in own}
    groups = _groups(stack.base)
    for number in networks_for(per, n_layers):
        group = next((found for found in groups[number] if adapted & set(found)), None)
        if group is None:
            continue
        reads[number] = group[0]
        found = [_direction(name, number, group, updates[name]) for name in experts]
        tensors[f"layers.{number}.prototypes"] = torch.stack(found).float()
    if not reads:
        raise AdapterError(
            f"arrow: {', '.join(experts)} change no linear layer that it could read off. Use how: learned."
        )
    n_features = anatomy.hidden_size(stack.base)
    return Gate(tuple(experts), per, "arrow", n_layers, n_features, tensors, top_k, hashes_of(stack, experts), reads)


def _refuse_numbers(per: str, hidden: int, top_k: int | None, n_experts: int) -> None:
    problems = []
    if per not in get_args(Per):
        problems.append(Problem("per", f"'{per}' is no place. Use one of: {', '.join(get_args(Per))}."))
    if hidden < 1:
        problems.append(Problem("hidden", f"{hidden} is no width. Give 1 or more."))
    if top_k is not None and not 1 <= top_k <= n_experts:
        problems.append(Problem("top_k", f"{top_k} of {n_experts} experts cannot be kept. Give 1 to {n_experts}."))
    if problems:
        raise InputError("gate", problems)


def _updates(name: str, adapter: Adapter) -> dict[str, Tensor]:
    """By linear layer, a matrix [R, I] with the right singular vectors and values of the expert's update."""
    if adapter.kind != "lora":
        raise AdapterError(f"arrow: {name} is of kind {adapter.kind}, which has no B A. Use how: learned.")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        found = PART.match(key.removeprefix(PREFIX))
        if found is not None:
            parts.setdefault(found["module"], {})[found["part"]] = tensor.detach().double()
    updates = {}
    for module, pair in parts.items():
        _, turn_RR = torch.linalg.qr(pair["B"], mode="r")
        updates[module] = turn_RR @ pair["A"] * scale_of(adapter.config, module, pair["A"].shape[0])
    return updates


def _direction(name: str, number: int, group: Sequence[str], updates: Mapping[str, Tensor]) -> Tensor:
    """The direction [I] of what a group of linear layers reads that an expert's update enlarges most."""
    own = [updates[module] for module in group if module in updates]
    if not any(bool(update.any()) for update in own):
        short = ", ".join(module.rsplit(".", 1)[-1] for module in group)
        raise AdapterError(f"arrow: {name} changes nothing in layer {number} ({short}). Use how: learned.")
    v_RI: Tensor = torch.linalg.svd(torch.cat(own), full_matrices=False).Vh
    return v_RI[0]


def _groups(model: nn.Module) -> dict[int, list[list[str]]]:
    """By decoder layer, its linear layers in the order in which they run, those together that read the same tensor."""
    layers = layer_numbers(model)
    seen: dict[int, list[tuple[Tensor, list[str]]]] = {number: [] for number in layers.values()}

    def note(name: str, number: int) -> Any:
        def read(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            same = next((names for x, names in seen[number] if _is_same(x, inputs[0])), None)
            if same is None:
                seen[number].append((inputs[0], [name]))  # held, so that no other tensor comes to lie there
            else:
                same.append(name)

        return read

    with _hooks(anatomy.linear_layers(model), layers, note), torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=anatomy.device_of(model)))
    return {number: [names for _, names in found] for number, found in seen.items()}


@contextmanager
def _hooks(linear: Mapping[str, nn.Module], layers: Mapping[str, int], note: Any) -> Iterator[None]:
    handles = []
    for name, module in linear.items():
        holding = holding_layer(layers, name)
        if holding is not None:
            handles.append(module.register_forward_pre_hook(note(name, layers[holding])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)
