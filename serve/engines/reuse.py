"""Keys and values of texts that were read or written before, for the next text that begins alike.

What is kept is a tree of blocks of tokens, so that what several texts begin with lies there once. A text is looked up
token by token: what is found is exactly the longest beginning it has in common with any kept one of its scope. Scopes
share nothing. Whatever was used longest ago goes first.
"""

# H heads, D width of a head, n tokens.

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

BLOCK = 32  # tokens
Columns = tuple[Tensor, ...]  # keys and values by layer, each [n, H, D]


@dataclass(eq=False)
class _Block:
    before: "_Block | None" = None
    ids: tuple[int, ...] = ()
    columns: Columns = ()
    after: "list[_Block]" = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.columns)


class Reuse:
    """See the head of this file. limit: bytes that it may hold; 0 keeps nothing. One thread."""

    def __init__(self, limit: int) -> None:
        self.limit, self.n_bytes = limit, 0
        self._roots: dict[Hashable, _Block] = {}
        self._lately: OrderedDict[_Block, Hashable] = OrderedDict()  # the longest unused first; never before its child

    def find(self, scope: Hashable, ids: Sequence[int]) -> tuple[int, list[Columns]]:
        """How many tokens a kept text has in common with the beginning of this one, and their columns, in pieces."""
        block, n_found = self._roots.get(scope), 0
        path: list[_Block] = []
        pieces: list[Columns] = []
        while block is not None and block.after:
            wanted = tuple(ids[n_found : n_found + BLOCK])
            n_alike, block = max(((_n_alike(one.ids, wanted), one) for one in block.after), key=lambda found: found[0])
            if not n_alike:
                break
            path.append(block)
            n_found += n_alike
            pieces.append(tuple(tensor[:n_alike] for tensor in block.columns))
            if n_alike < BLOCK:
                break
        self._touch(scope, path)
        return n_found, pieces

    def keep(self, scope: Hashable, ids: Sequence[int], copied: Callable[[int, int], Columns]) -> None:
        """Remember a text. `copied` gives a copy of the columns of its tokens from … to."""
        if not self.limit or not ids:
            return
        block = self._roots.setdefault(scope, _Block())
        path: list[_Block] = []
        for first in range(0, len(ids), BLOCK):
            wanted = tuple(ids[first : first + BLOCK])
            alike = [(_n_alike(one.ids, wanted), one) for one in block.after]
            longest, found = max(alike, key=lambda one: one[0], default=(0, _Block()))
            if longest < len(wanted):  # else what is wanted lies in it
                if not longest or longest < len(found.ids):
                    found = _Block(block)
                    block.after.append(found)
                self.n_bytes -= found.n_bytes
                found.ids, found.columns = wanted, copied(first, first + len(wanted))
                self.n_bytes += found.n_bytes
            path.append(found)
            block = found
        self._touch(scope, path)
        self._shrink()

    def clear(self) -> None:
        """Forget everything."""
        self._roots.clear()
        self._lately.clear()
        self.n_bytes = 0

    def _touch(self, scope: Hashable, path: Sequence[_Block]) -> None:
        """What was used: a block later than those that come after it, so that the first to go is always a last one."""
        for block in reversed(path):
            self._lately[block] = scope
            self._lately.move_to_end(block)

    def _shrink(self) -> None:
        while self.n_bytes > self.limit:
            block, scope = self._lately.popitem(last=False)
            self.n_bytes -= block.n_bytes
            if block.before is not None:
                block.before.after.remove(block)
            if not self._roots[scope].after:
                del self._roots[scope]


def _n_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    for place, (own, theirs) in enumerate(zip(one, other, strict=False)):
        if own != theirs:
            return place
    return min(len(one), len(other))
