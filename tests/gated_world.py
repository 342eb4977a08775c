"""What the tests of gates share: gates whose networks are far from their start, and what a gate answers at once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from toolkit.combine.gate import Gate, gated
from toolkit.combine.gate_start import new_gate
from toolkit.stack.stack import Stack

EXPERTS = ("lora", "lora-7", "reft")


def shaken(gate: Gate, seed: int = 3, by: float = 1.0) -> Gate:
    """The same gate with noise on every tensor: weights that differ from token to token."""
    noise = torch.Generator().manual_seed(seed)
    tensors = {name: tensor + by * torch.randn(tensor.shape, generator=noise) for name, tensor in gate.tensors.items()}
    return replace(gate, tensors=tensors)


def some_gate(stack: Stack, experts: Sequence[str] = EXPERTS, **given: Any) -> Gate:
    """A gate that weighs, and has not learnt."""
    return shaken(new_gate(stack, experts, **{"hidden": 5, **given}))


def at_once(stack: Stack, gate: Gate, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """The logits of every position, in one pass without a cache, [B, T, V]."""
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    with gated(stack, gate) as opened:
        return opened.logits(ids_BT, mask_BT, None, torch.ones_like(ids_BT)).view(*ids_BT.shape, -1)
