"""Gradients of adapters that learn side by side: clipping that knows no neighbours."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from toolkit.stack.stack import Stack


def clip_gradients(stack: Stack, limits: Mapping[str, float]) -> Tensor:
    """Shorten each adapter's gradient to its own limit, as torch's clip_grad_norm_ would; the lengths before."""
    grads = [_gradients(stack, name) for name in limits]
    norms = _norms(grads)
    for own, norm, limit in zip(grads, norms, limits.values(), strict=True):
        torch._foreach_mul_(own, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norms


def _norms(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    lengths = torch.stack(torch._foreach_norm([grad for own in grads for grad in own]))
    parts = torch.split(lengths, [len(own) for own in grads])
    return torch.stack([torch.linalg.vector_norm(part) for part in parts])


def _gradients(stack: Stack, name: str) -> list[Tensor]:
    return [leaf.grad for leaf in stack.learning(name).values() if leaf.grad is not None]
