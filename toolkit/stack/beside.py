"""Adapters of layers that read the same input (q, k and v; gate and up), for forward passes written by hand."""

# G groups of rows, N tokens in a group, M layers, I/O features in/out, R rank of a layer, C all their ranks,
# X = G·M (in back_X rows times M).

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.stack.grouped import Gathered


@dataclass(frozen=True)
class Beside:
    """A of all layers beside each other, and B of each, its scale inside.

    a_GIC: as it is read; the other way a product of few tokens copies it first (docs/log.md).
    together_XRO: B of all layers group by group, [G·M, R, O], where ranks and outputs are equal; `b` are views of it.
    """

    a_GIC: Tensor
    b: tuple[Tensor, ...]
    together_XRO: Tensor | None

    @classmethod
    def of(cls, a: Sequence[Tensor], b: Sequence[Tensor]) -> "Beside":
        """From A [G, R, I] and B [G, R, O] of each layer."""
        a_GIC = torch.cat(list(a), dim=1).mT.contiguous()
        if any(one.shape != b[0].shape for one in b):
            return cls(a_GIC, tuple(b), None)
        b_GMRO = torch.stack(list(b), dim=1)
        return cls(a_GIC, b_GMRO.unbind(1), b_GMRO.flatten(0, 1))

    def add(self, parts: Sequence[Tensor], x: Tensor, together: Gathered | None, whole: Tensor | None) -> None:
        """Add x @ a.T @ b to each layer's part of the output, in place.

        together: the rows brought together by adapter, where they are. whole: the tensor that holds the parts and
        nothing else, where they are all of it.
        """
        n_groups = len(self.a_GIC)
        is_whole = self.together_XRO is not None and whole is not None and x.shape[1] == 1 and whole.is_contiguous()
        if together is not None:
            u_GNC = self._down(x.index_select(0, together.rows), n_groups)
            if is_whole:
                self._add_whole(whole, self._layer_by_layer(u_GNC), together.back_X(len(self.b)))
                return
            for part, u_GNR, b_GRO in zip(parts, self._by_layer(u_GNC), self.b, strict=True):
                update = torch.bmm(u_GNR, b_GRO).view(-1, *part.shape[1:])
                part.add_(update.index_select(0, together.back_B))
            return
        u_GNC = self._down(x, n_groups)
        if is_whole and u_GNC.shape[1] == 1:
            self._add_whole(whole, self._layer_by_layer(u_GNC), None)
            return
        for part, u_GNR, b_GRO in zip(parts, self._by_layer(u_GNC), self.b, strict=True):
            part.view(n_groups, -1, part.shape[-1]).baddbmm_(u_GNR, b_GRO)

    def _down(self, x: Tensor, n_groups: int) -> Tensor:
        return torch.bmm(x.reshape(n_groups, -1, x.shape[-1]), self.a_GIC)

    def _layer_by_layer(self, u_GNC: Tensor) -> Tensor:
        """[G·M, N, R]: what each layer's B multiplies, group by group."""
        n_groups, n_tokens, _ = u_GNC.shape
        return u_GNC.view(n_groups, n_tokens, len(self.b), -1).transpose(1, 2).flatten(0, 1)

    def _add_whole(self, whole: Tensor | None, u_XNR: Tensor, back_X: Tensor | None) -> None:
        """Add all layers at once, to one token a row; back_X: where each row and layer lies in the products."""
        assert whole is not None and self.together_XRO is not None  # the caller has seen to it
        n_out = self.together_XRO.shape[2]
        if back_X is None:
            whole.view(-1, 1, n_out).baddbmm_(u_XNR, self.together_XRO)
            return
        update_XNO = torch.bmm(u_XNR, self.together_XRO)
        whole.view(-1, n_out).add_(update_XNO.view(-1, n_out).index_select(0, back_X))

    def _by_layer(self, u_GNC: Tensor) -> tuple[Tensor, ...]:
        return torch.split(u_GNC, [one.shape[1] for one in self.b], dim=-1)
