"""Merging by the numbers of whole updates: trimmed, dropped at random, agreed upon by sign.

Weights say how much of each update goes in, for every method alike: where all members are equal, or there is only one,
the result is sum_k w_k times it, as the weighted sum would be. So ties at weights of 1/K is the paper's (and PEFT's at
weights of 1). The members elect a sign by what they would add, so one of weight 0 has no say.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Sparse = Callable[[Sequence[Tensor], Sequence[float], float, Sequence[int]], Tensor]


def magnitude_prune(
    updates: Sequence[Tensor], weights: Sequence[float], density: float, draws: Sequence[int]
) -> Tensor:
    """The weighted sum of updates of which the share `density` that is largest in magnitude stays (arXiv 1506.02626).

    `draws` are not used: nothing is random.
    """
    del draws
    return _summed([trimmed(update, density) for update in updates], weights)


def ties(updates: Sequence[Tensor], weights: Sequence[float], density: float, draws: Sequence[int]) -> Tensor:
    """Trim, elect a sign for each number, average those that agree (TIES-Merging, arXiv 2306.01708).

    Each update is trimmed by itself, as in PEFT; the paper trims whole models. `draws` are not used.
    """
    del draws
    return _elected([trimmed(update, density) for update in updates], weights)


def dare_linear(updates: Sequence[Tensor], weights: Sequence[float], density: float, draws: Sequence[int]) -> Tensor:
    """Drop numbers at random, enlarge the rest by 1 / density, take the weighted sum (DARE, arXiv 2311.03099).

    On average over draws it is the weighted sum of the updates. `draws`: a seed for each member.
    """
    return _summed([dropped(update, density, draw) for update, draw in zip(updates, draws, strict=True)], weights)


def dare_ties(updates: Sequence[Tensor], weights: Sequence[float], density: float, draws: Sequence[int]) -> Tensor:
    """Drop at random as `dare_linear` (arXiv 2311.03099), then elect signs as `ties` (arXiv 2306.01708)."""
    return _elected([dropped(update, density, draw) for update, draw in zip(updates, draws, strict=True)], weights)


SPARSE: dict[str, Sparse] = {
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}


def trimmed(update: Tensor, density: float) -> Tensor:
    """The share `density` of the numbers that is largest in magnitude (at least one), the others 0."""
    if density >= 1.0:
        return update
    flat = update.flatten()
    kept = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(update)


def dropped(update: Tensor, density: float, draw: int) -> Tensor:
    """Each number with probability `density`, divided by it, otherwise 0; the same for the same draw, on any device."""
    if density >= 1.0:
        return update
    noise = torch.rand(update.shape, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)
    return update * (noise < density).to(update.device, update.dtype) / density


def draw_of(seed: int, member: str, layer: str) -> int:
    """A seed of a member's own in a layer: the others, and their order, do not change what it loses."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{member}/{layer}".encode()).digest()[:7], "little")


def _summed(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        total += weight * update
    return total


def _elected(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    sign = torch.where(_summed(updates, weights) >= 0, 1.0, -1.0)
    total, heard = torch.zeros_like(updates[0]), torch.zeros_like(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        agrees = (weight * update).sign() == sign
        total += (weight * update).where(agrees, 0.0)
        heard += abs(weight) * agrees
    return sum(map(abs, weights)) * total / heard.where(heard > 0, 1.0)
