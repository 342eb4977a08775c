"""Weights in eight bits, and the products of float32 rows with them, by fbgemm's integers on a CPU.

fbgemm measures ONE scale for all activations of a call, so a row's numbers would depend on its neighbours. Here each
row is divided by its own largest number first, and one more row, of 1 and -1, pins what fbgemm measures: every call has
the same scale. Sums of integers are exact in any order, so a row's product has the same bits in any company.
"""

# N rows, O features out, I features in.

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from toolkit.errors import BaseError

ENGINE = "fbgemm"
FLAG = "--cpu-int8"
LARGEST = 127  # of a weight's whole numbers; as many below zero
LEAST = 1e-30  # what a row is divided by at least
PROBE = 256  # products that are summed to see whether sums overflow


class Int8:
    """A weight [O, I], I of 2 or more, rounded to whole numbers of its own scale for each feature out.

    has_7_bits: activations have 7 bits instead of 8, as they need where the CPU has no VNNI (`needs_7_bits`). Takes a
    quarter of the memory of the weight. Raises: BaseError where this torch has no fbgemm, or the weight is not finite.
    """

    def __init__(self, weight: Tensor, *, has_7_bits: bool) -> None:
        refuse_engine()
        weight_OI = weight.detach().float()
        if not bool(weight_OI.isfinite().all()):
            raise BaseError(f"A weight of the base is not finite, so it cannot be rounded. Serve it without {FLAG}.")
        self._has_7_bits = has_7_bits
        self._packed = _packed(weight_OI)
        self._pin_I = torch.full((weight_OI.shape[1],), -1.0)
        self._pin_I[0] = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """x @ weight.T for x […, I] in float32; a row that holds what is no number gives nothing but such."""
        x_NI = x.reshape(-1, x.shape[-1])
        most_N1 = x_NI.abs().amax(1, keepdim=True)  # vector_norm takes twenty times as long
        shares_NI = x_NI.new_empty(len(x_NI) + 1, x_NI.shape[1])
        torch.div(x_NI, most_N1.clamp(min=LEAST), out=shares_NI[:-1])
        if not math.isfinite(most_N1.sum().item()):
            shares_NI.nan_to_num_(0.0)
        shares_NI[-1] = self._pin_I
        made_NO: Tensor = torch.ops.quantized.linear_dynamic(shares_NI, self._packed, self._has_7_bits)
        return made_NO[:-1].mul_(most_N1).view(*x.shape[:-1], -1)


def needs_7_bits() -> bool:
    """Whether sums of 8-bit activations overflow on this CPU: without VNNI two products are added in 16 bits."""
    refuse_engine()
    row_NI = torch.ones(2, PROBE)
    row_NI[1] = -1.0
    made_NO: Tensor = torch.ops.quantized.linear_dynamic(row_NI, _packed(torch.ones(8, PROBE)), False)
    return bool((made_NO[0] - PROBE).abs().max() > PROBE / 50)


def refuse_engine() -> None:
    """Raise BaseError where this torch has no fbgemm."""
    has_tensors = hasattr(torch, "quantize_per_channel") and hasattr(torch.ops.quantized, "linear_dynamic")
    if ENGINE not in torch.backends.quantized.supported_engines or not has_tensors:
        raise BaseError(f"{FLAG}: this torch was built without {ENGINE}, which multiplies in 8 bits. Leave it out.")


def _packed(weight_OI: Tensor) -> torch.ScriptObject:
    scale_O = (weight_OI.abs().amax(1) / LARGEST).clamp(min=LEAST)
    zeros_O = torch.zeros(len(scale_O), dtype=torch.long)
    with _engine(), warnings.catch_warnings():
        # torch 2.13 says that quantised tensors will go (pytorch/pytorch#184982); `refuse_engine` sees when they have
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        rounded_OI = torch.quantize_per_channel(weight_OI, scale_O, zeros_O, 0, torch.qint8)
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(rounded_OI, None)
    return packed


@contextmanager
def _engine() -> Iterator[None]:
    """Inside, what is packed is packed for fbgemm."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
