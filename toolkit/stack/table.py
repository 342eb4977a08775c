"""One tensor that holds a part of every adapter, [places, *shape], padded with zeros to the largest; place 0 is zero.

The whole tensor is the leaf that autograd sees, so that no forward pass loops over adapters. An adapter that learns
also has a leaf of its own: a view into the same numbers and into the same gradient, which an optimizer can be given. A
place is a row of the tensor; the tables of one shelf number them alike.
"""

from collections.abc import Sequence, Set

import torch
from torch import Tensor

FIRST_PLACES = 5  # then 9, 17, 33: as many adapters as a power of two, and place 0


class Table:
    """See the head of this file.

    `is_transposed`: values come and go with their last two axes swapped. `at_end`: padding stands before a value in its
    first axis, not after it.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, *, is_transposed: bool = False, at_end: bool = False
    ) -> None:
        self.device, self.dtype, self.is_transposed, self.at_end = device, dtype, is_transposed, at_end
        self.dense: Tensor = torch.zeros(0, device=device, dtype=dtype)
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._leaves: dict[int, Tensor] = {}
        self._is_hooked = False

    def put(self, place: int, value: Tensor, *, learns: bool) -> None:
        """Copy a value into a place that is free; it grows what has to grow and moves no other adapter's leaf."""
        inner = value.detach().mT if self.is_transposed else value.detach()
        self._reserve(place + 1, inner.shape)
        self._sizes[place] = tuple(inner.shape)
        self._inside(self.dense.detach(), place).copy_(inner)
        if learns:
            self._leaves[place] = self._shown(self.dense.detach(), place).requires_grad_(True)
            self._let_learn()

    def have_places(self, n_places: int) -> None:
        """Grow to at least this many places: a layer that an adapter leaves alone has zeros for it."""
        self._reserve(n_places, self.dense.shape[1:])

    def clear(self, place: int) -> None:
        """Empty a place: zeros again, gradient included. Nothing happens where nothing was."""
        if self._sizes.pop(place, None) is None:
            return
        self.dense.detach()[place].zero_()
        self._leaves.pop(place, None)
        if not self._leaves:
            self.dense.grad = None
            self.dense.requires_grad_(False)
        elif self.dense.grad is not None:
            self.dense.grad[place].zero_()

    def value(self, place: int) -> Tensor:
        """What `put` was given, as it is now; a copy."""
        return self._shown(self.dense.detach(), place).clone().contiguous()

    def leaf(self, place: int) -> Tensor:
        """The view that an optimizer changes, its gradient tied to that of the whole. KeyError: it does not learn."""
        leaf = self._leaves[place]
        if self.dense.grad is None:
            self.settle()
        elif leaf.grad is None:
            self._tie(place, leaf)
        return leaf

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in it."""
        return not self._sizes

    def sizes(self) -> dict[int, tuple[int, ...]]:
        """The shape of what is at each place, as it lies there."""
        return self._sizes

    def settle(self) -> None:
        """Tie every leaf's gradient to its part of the whole one, into which autograd adds in place.

        A leaf whose gradient an optimizer set to None gets one of zero. Called before autograd adds anything.
        """
        if not self._leaves:
            return
        if self.dense.grad is None:
            self.dense.grad = torch.zeros_like(self.dense)
            for leaf in self._leaves.values():
                leaf.grad = None
        for place, leaf in self._leaves.items():
            if leaf.grad is None:
                self._tie(place, leaf)

    def gradients(self, places: Set[int]) -> list[Tensor]:
        """What of the whole gradient is these places' alone, padding included: all of it where no other learns."""
        learning = [self.leaf(place) for place in places & self._leaves.keys()]
        if self.dense.grad is None:
            return []
        if len(learning) == len(self._leaves):
            return [self.dense.grad]
        return [self.dense.grad[place] for place in places & self._sizes.keys()]

    def _tie(self, place: int, leaf: Tensor) -> None:
        assert self.dense.grad is not None  # the callers have seen to it
        self.dense.grad[place].zero_()
        leaf.grad = self._shown(self.dense.grad, place)

    def _reserve(self, n_places: int, shape: Sequence[int]) -> None:
        old = self.dense
        inner = [max(sizes) for sizes in zip(shape, old.shape[1:], strict=True)] if old.dim() > 1 else list(shape)
        places = old.shape[0] or FIRST_PLACES
        while places < n_places:
            places = 2 * places - 1
        if old.shape == (places, *inner):
            return
        self.settle()
        new = torch.zeros(places, *inner, device=self.device, dtype=self.dtype)
        gradient = None if old.grad is None else torch.zeros_like(new)
        for place in self._sizes:
            self._inside(new, place).copy_(self._inside(old.detach(), place))
            if gradient is not None and old.grad is not None:
                self._inside(gradient, place).copy_(self._inside(old.grad, place))
        self.dense, self._is_hooked = new, False
        for place, leaf in self._leaves.items():
            leaf.grad = None
            leaf.data = self._shown(new, place)
            leaf.grad = None if gradient is None else self._shown(gradient, place)
        self.dense.grad = gradient
        if self._leaves:
            self._let_learn()

    def _let_learn(self) -> None:
        self.dense.requires_grad_(True)
        if not self._is_hooked:
            self.dense.register_hook(lambda gradient: self.settle())  # type: ignore[no-untyped-call]
            self._is_hooked = True
        self.settle()

    def _inside(self, whole: Tensor, place: int) -> Tensor:
        part = whole[place]
        for axis, size in enumerate(self._sizes[place]):
            if size != part.shape[axis]:
                start = part.shape[axis] - size if self.at_end and axis == 0 else 0
                part = part.narrow(axis, start, size)
        return part

    def _shown(self, whole: Tensor, place: int) -> Tensor:
        part = self._inside(whole, place)
        return part.mT if self.is_transposed else part
