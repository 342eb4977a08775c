"""Sums of low-rank updates, worked out on their factors: no matrix as large as a layer is made, save where it says so.

All in float64, so that what is left of a difference is the method's own. Tensors stay where the factors lie.
"""

# I features in, O features out, R rank, N the smaller of I and O.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Update:
    """The update of one layer: b @ a, with every scale inside."""

    a_RI: Tensor
    b_OR: Tensor

    @property
    def rank(self) -> int:
        """Rows of a, columns of b."""
        return int(self.a_RI.shape[0])


@dataclass(frozen=True)
class Part:
    """What one member brings to one layer: its factors, the scale of their product, and the member's weight."""

    member: str
    weight: float
    scale: float
    a_RI: Tensor
    b_OR: Tensor

    @property
    def amount(self) -> float:
        """By how much b @ a goes into the sum."""
        return self.weight * self.scale

    @property
    def rank(self) -> int:
        """Rows of a, columns of b."""
        return int(self.a_RI.shape[0])

    def full_OI(self) -> Tensor:
        """The member's update, weight left out, as a matrix as large as the layer."""
        return self.scale * (self.b_OR @ self.a_RI)


def exact(parts: Sequence[Part]) -> Update:
    """The weighted sum itself: rows of A, and columns of B times weight and scale, one member after another.

    Ranks add up. Source: task arithmetic, arXiv 2212.04089; the factors side by side as in PEFT's `cat`.
    """
    return Update(torch.cat([part.a_RI for part in parts]), torch.cat([part.b_OR * part.amount for part in parts], 1))


def svd(parts: Sequence[Part], rank: int) -> Update:
    """The update of this rank nearest to the weighted sum (Eckart and Young 1936, Psychometrika 1(3)).

    A QR of each stack of factors leaves a core of R x R to decompose, R the sum of ranks. Cost: (I + O) R^2 + R^3.
    """
    whole = exact(parts)
    q_OR, right_RR = torch.linalg.qr(whole.b_OR)
    q_IR, left_RR = torch.linalg.qr(whole.a_RI.mT)
    u_RR, values_R, v_RR = torch.linalg.svd(right_RR @ left_RR.mT, full_matrices=False)
    root_R = values_R[:rank].sqrt()
    return Update(root_R[:, None] * (v_RR[:rank] @ q_IR.mT), (q_OR @ u_RR[:, :rank]) * root_R)


def linear(parts: Sequence[Part]) -> Update:
    """A added to A and B to B (arXiv 2306.14870, as in PEFT), scaled to lie as near to the weighted sum as it can.

    The product of two sums also multiplies each member's B by every other's A, so that two equal members at half a
    weight each would come out doubled; the scale undoes that, and is 1 for one member alone. All ranks are equal.
    """
    roots = [math.sqrt(abs(part.amount)) for part in parts]
    a_RI = torch.stack([part.a_RI * math.copysign(root, part.amount) for part, root in zip(parts, roots, strict=True)])
    b_OR = torch.stack([part.b_OR * root for part, root in zip(parts, roots, strict=True)])
    found = Update(a_RI.sum(0), b_OR.sum(0))
    own = inner(found, found)
    scale = inner(found, exact(parts)) / own if own > 0 else 1.0
    return Update(found.a_RI, found.b_OR * scale)


def nearest(matrix_OI: Tensor, rank: int) -> Update:
    """The update of this rank nearest to a whole matrix.

    By the eigenvectors of its smaller square: singular values below 1e-8 of the largest are not told apart. Cost: a
    matrix product and an eigendecomposition of N x N.
    """
    if matrix_OI.shape[0] > matrix_OI.shape[1]:
        turned = nearest(matrix_OI.mT, rank)
        return Update(turned.b_OR.mT, turned.a_RI.mT)
    _, vectors_OO = torch.linalg.eigh(matrix_OI @ matrix_OI.mT)
    b_OR = vectors_OO[:, max(0, vectors_OO.shape[1] - rank) :]
    return Update(b_OR.mT @ matrix_OI, b_OR)


def padded(update: Update, rank: int) -> Update:
    """The same update in factors of a larger rank, filled with zeros."""
    more = rank - update.rank
    return Update(
        torch.nn.functional.pad(update.a_RI, (0, 0, 0, more)), torch.nn.functional.pad(update.b_OR, (0, more))
    )


def inner(left: Update, right: Update) -> float:
    """The sum of the products of both updates' numbers, one by one."""
    return float(((left.b_OR.mT @ right.b_OR) * (left.a_RI @ right.a_RI.mT)).sum())


def norm(update: Update) -> float:
    """The Frobenius norm of b @ a; exact to rounding even where large factors cancel."""
    _, right_RR = torch.linalg.qr(update.b_OR, mode="r")
    _, left_RR = torch.linalg.qr(update.a_RI.mT, mode="r")
    return float(torch.linalg.matrix_norm(right_RR @ left_RR.mT))


def distance(left: Update, right: Update) -> float:
    """The Frobenius norm of the difference of two updates."""
    return norm(Update(torch.cat([left.a_RI, right.a_RI]), torch.cat([left.b_OR, -right.b_OR], 1)))
