"""What a forward pass written by hand needs of a base: that it is what its family's code makes, and weights of layers
that read the same input side by side in memory, of which the base's own parameters are parts.
"""

# O features out, I features in.

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from serve.engines.int8 import FLAG, Int8, refuse_engine
from toolkit.adapters import anatomy
from toolkit.errors import BaseError

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList)
ROWS = 32  # that weights are packed for: what one row is packed for is slower, and other numbers for other counts
SILU = ("silu", "swish")


@dataclass(frozen=True)
class Joined:
    """Linear layers by name, their weights below each other: [O, I], of which each has so many rows as its width.

    packed: the same weights once more, laid out for oneDNN; int8: once more, in eight bits, which then answer. With
    either a row's numbers depend on no neighbour, to the bit.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None = None
    int8: Int8 | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """What the layers give, beside each other."""
        if self.int8 is not None:
            rounded = self.int8(x)
            return rounded if self.bias is None else rounded.add_(self.bias)
        if self.packed is None:
            return functional.linear(x, self.weight, self.bias)
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return made

    def pack(self) -> "Joined":
        """With the packed weights."""
        return replace(self, packed=torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS))

    def round(self, *, has_7_bits: bool) -> "Joined":
        """With the weights in eight bits (`Int8`)."""
        return replace(self, int8=Int8(self.weight, has_7_bits=has_7_bits))


def unlike(base: nn.Module) -> str | None:
    """Why a base is not, part by part, what transformers makes for one of these families; None where it is."""
    home, name = type(base).__module__, type(base).__name__
    family = next((one for one in FAMILIES if name == f"{one}{PARTS[0]}"), None)
    if family is None or home != f"transformers.models.{family.lower()}.modeling_{family.lower()}":
        return f"{name} is none of {', '.join(FAMILIES)}"
    config = anatomy.text_config(base)
    if config.hidden_act not in SILU:
        return f"its activation is {config.hidden_act}"
    for place, module in base.named_modules():
        is_own = type(module).__module__ == home and type(module).__name__.removeprefix(family) in PARTS
        if not (is_own or type(module) in PLAIN or place.endswith(".act_fn")):
            return f"{place} is a {type(module).__name__}"
        if "forward" in vars(module):
            return f"the forward pass of {place or name} was replaced"
    for place, parameter in base.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            return f"{place} lies on {parameter.device.type} in {str(parameter.dtype).removeprefix('torch.')}"
    return None


def refuse_other(base: nn.Module) -> None:
    """Raise BaseError for a base that is unlike these families."""
    why = unlike(base)
    if why is not None:
        raise BaseError(f"The lean forward pass does not fit this base: {why}. Serve it with --forward modules.")


def refuse_int8(base: nn.Module) -> None:
    """Raise BaseError for a base that cannot run in eight bits here, and where this torch cannot multiply so."""
    refuse_engine()
    device = next(base.parameters()).device.type
    if device != "cpu":
        raise BaseError(f"{FLAG}: this base runs on {device}. Leave it out, or add --device cpu.")
    why = unlike(base)
    if why is not None:
        raise BaseError(f"{FLAG} needs a base that the lean forward pass fits: {why}. Leave it out.")


def can_pack() -> bool:
    """Whether this torch has oneDNN's linear layers."""
    is_there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_there and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


@torch.inference_mode(False)
def joined(linears: Sequence[Any], names: Sequence[str]) -> Joined:
    """Layers that read the same input as one; from now on their parameters are parts of it, their values as before."""
    weight = _whole([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else _whole(biases)
    return Joined(tuple(names), tuple(linear.out_features for linear in linears), weight, bias)


def _whole(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Parameters below each other in one tensor, without a copy where they lie so already."""
    first = parameters[0].detach()
    if len(parameters) == 1:
        return first
    n_rows = sum(len(one) for one in parameters)
    if not _lie_together(parameters):
        whole = torch.cat([one.detach() for one in parameters])
        for parameter, part in zip(parameters, torch.split(whole, [len(one) for one in parameters]), strict=True):
            parameter.data = part
        return whole
    return first.as_strided((n_rows, *first.shape[1:]), first.stride())


def _lie_together(parameters: Sequence[nn.Parameter]) -> bool:
    place = parameters[0].data_ptr()
    storage = parameters[0].untyped_storage().data_ptr()
    for one in parameters:
        if one.data_ptr() != place or one.untyped_storage().data_ptr() != storage or not one.is_contiguous():
            return False
        place += one.numel() * one.element_size()
    return True
