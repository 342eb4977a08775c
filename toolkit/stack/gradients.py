"""Gradients of adapters that learn side by side: how long each one's is, and clipping that knows no neighbours."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from toolkit.stack.stack import Stack


def gradient_norms(stack: Stack, names: Sequence[str]) -> Tensor:
    """The length of each adapter's gradient over all its leaves, in the order of the names."""
    grads = [_gradients(stack, name) for name in names]
    lengths = iter(torch._foreach_norm([grad for own in grads for grad in own]))
    norms = [torch.linalg.vector_norm(torch.stack([next(lengths) for _ in own])) for own in grads]
    return torch.stack(norms)


def clip_gradients(stack: Stack, limits: Mapping[str, float]) -> Tensor:
    """Shorten each adapter's gradient to its own limit, as torch's clip_grad_norm_ would; the lengths before."""
    norms = gradient_norms(stack, list(limits))
    for norm, (name, limit) in zip(norms, limits.items(), strict=True):
        torch._foreach_mul_(_gradients(stack, name), (limit / (norm + 1e-6)).clamp(max=1.0))
    return norms


def _gradients(stack: Stack, name: str) -> list[Tensor]:
    return [leaf.grad for leaf in stack.learning(name).values() if leaf.grad is not None]
