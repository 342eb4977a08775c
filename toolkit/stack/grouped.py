"""Which rows belong to which adapter, and the multiplications that serve them all at once.

Rows that follow each other and belong to the same adapter are multiplied together: the batch is cut into G groups of
one size (the greatest common divisor of the runs of equal owners) and one `bmm` serves all groups. Sorted owners with
equal counts give one group an adapter and copy no weights; owners in any order give one group a row. When few tokens
are decoded, reading weights is what costs, so rows of one adapter are brought together first and read them once
(`Plan.gathered`). Gate weights use another form, one wide matmul over all adapters with the weights between its two
halves. docs/log.md has the measurements behind all three.
"""

# B rows, T tokens, G groups of rows, N tokens in a group, K adapters, I/O features in/out, R rank, P places.

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import AdapterError

COPIES = 4  # how often bringing rows together copies a token, in units of reading one row of A and B
MOST_PADDING = 2.0


@dataclass
class Plan:
    """The places of one shelf that the rows of a batch are served from, one per group of `group_size` rows.

    is_apart: rows are never brought together. `kept` holds what was worked out for these very rows while nothing
    learns: decoding asks the same thing every step.
    """

    places: tuple[int, ...]
    group_size: int
    n_rows: int
    is_apart: bool = False
    kept: dict[Any, Any] = field(default_factory=dict)
    n_kept_bytes: int = 0

    def index_G(self, device: torch.device) -> Tensor:
        """The places as a tensor."""
        made: Tensor = self.memo(("index", device), lambda: on_device(self.places, device))
        return made

    def row_index_B(self, device: torch.device) -> Tensor:
        """The place of each row as a tensor."""
        made: Tensor = self.memo(("rows", device), lambda: self.index_G(device).repeat_interleave(self.group_size))
        return made

    @property
    def all_kept_bytes(self) -> int:
        """What this plan and those behind it, one a device, keep."""
        behind = [found.plan for found in self.kept.values() if isinstance(found, Gathered)]
        return self.n_kept_bytes + sum(plan.n_kept_bytes for plan in behind)

    def gathered(self, x: Tensor, rank: int) -> "Gathered | None":
        """The rows brought together by adapter, where copying them costs less than reading weights once a row."""
        if torch.is_grad_enabled() or x.shape[0] != self.n_rows or self.group_size * len(self.places) != self.n_rows:
            return None
        found: Gathered | None = self.memo(("gathered", x.device), lambda: _gather(self, x.device))
        if found is None:
            return None
        n_tokens = x.numel() // (x.shape[0] * x.shape[-1])
        is_cheaper = n_tokens * COPIES <= rank * (1 - len(found.plan.places) / len(self.places))
        return found if is_cheaper else None

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """What depends on the rows alone is made once."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def select(self, table_PXX: Tensor) -> Tensor:
        """The part of a table that each group needs; a view where the places follow each other."""
        first, count = self.places[0], len(self.places)
        if self.places == tuple(range(first, first + count)):
            return table_PXX[first : first + count]
        return table_PXX.index_select(0, self.index_G(table_PXX.device))


@dataclass(frozen=True)
class Gathered:
    """A plan whose groups are the adapters, with the row that stands in each of its places, and each row's place."""

    plan: Plan
    rows: Tensor
    back_B: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)

    def back_X(self, n_layers: int) -> Tensor:
        """Where row b of layer m lies in products [G, M, N], flattened: at b·M + m. Worked out once."""
        if n_layers not in self.kept:
            size, layer_M = self.plan.group_size, torch.arange(n_layers, device=self.back_B.device)
            first_B1 = (self.back_B // size * n_layers * size + self.back_B % size).unsqueeze(1)
            self.kept[n_layers] = (first_B1 + layer_M * size).flatten()
        return self.kept[n_layers]


@dataclass
class Mix:
    """Gate weights for one shelf: the places of the K adapters, and what to ask for the weights of a layer.

    `kept`: what was worked out for these places, from pass to pass.
    """

    places: tuple[int, ...]
    weights: Callable[[int | None], Tensor]
    kept: dict[Any, Any] = field(default_factory=dict)

    def numbers(self, numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Numbers of these places on a device, copied there once."""
        key = (numbers, device, dtype)
        if key not in self.kept:
            self.kept[key] = on_device(numbers, device, dtype)
        made: Tensor = self.kept[key]
        return made

    def select(self, table_PXX: Tensor) -> Tensor:
        """The part of a table that each adapter needs."""
        return table_PXX.index_select(0, self.numbers(self.places, table_PXX.device, torch.long))


def plan_rows(places_B: Sequence[int], *, apart: bool) -> Plan | None:
    """Cut rows into groups; None where no row has a place of its own. `apart`: every row is a group."""
    if not any(places_B):
        return None
    runs = [(place, len(list(rows))) for place, rows in groupby(places_B)]
    size = 1 if apart else math.gcd(*(length for _, length in runs))
    places = tuple(place for place, length in runs for _ in range(length // size))
    return Plan(places, size, len(places_B), is_apart=apart)


def _gather(plan: Plan, device: torch.device) -> Gathered | None:
    """None where nothing is shared, or one adapter has so many of the rows that padding the others would cost more."""
    if plan.is_apart:
        return None
    places_B = [place for place in plan.places for _ in range(plan.group_size)]
    rows = {place: [row for row, own in enumerate(places_B) if own == place] for place in sorted(set(places_B))}
    size = max(len(own) for own in rows.values())
    if len(rows) >= len(plan.places) or len(rows) * size > MOST_PADDING * plan.n_rows:
        return None
    back = [0] * plan.n_rows
    for group, own in enumerate(rows.values()):
        for index, row in enumerate(own):
            back[row] = group * size + index
    order = [row for own in rows.values() for row in own + [own[0]] * (size - len(own))]
    grouped = Plan(tuple(rows), size, len(order))
    return Gathered(grouped, on_device(order, device), on_device(back, device))


def on_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers as a tensor there, without waiting for what a GPU has still to do."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def as_read(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the type of the weights it meets; as it is under autocast, which turns both into its own type."""
    kind = x.device.type
    is_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x if is_autocast else x.to(dtype)


def in_groups(values: Tensor, plan: Plan, what: str) -> Tensor:
    """Values whose first axis runs over rows (or over rows and tokens, rows first) as [G, N, features].

    Raises: AdapterError where the first axis cannot be rows.
    """
    if values.shape[0] % plan.n_rows:
        raise AdapterError(
            f"{what}: its input has {values.shape[0]} rows where the batch has {plan.n_rows} (or they are routed "
            "tokens), so the stack cannot tell whose they are. An adapter on this layer trains alone and serves merged."
        )
    return values.reshape(len(plan.places), -1, values.shape[-1])


def add_grouped(y: Tensor, x_GNI: Tensor, a_GRI: Tensor, b_GRO: Tensor, scale_G11: Tensor | None) -> Tensor:
    """y + x @ a.T @ b * scale for each group, in y's own type and shape; where no gradient is wanted, into y itself.

    Cost: G·N·R·(I+O) multiply-adds. Source: LoRA, arXiv 2106.09685 section 4.1.
    """
    u_GNR = torch.bmm(x_GNI, a_GRI.mT)
    if scale_G11 is not None:
        u_GNR = u_GNR * scale_G11
    n_groups, n_tokens, _ = x_GNI.shape
    y_GNO = y.reshape(n_groups, n_tokens, y.shape[-1])
    lies_there = y_GNO.data_ptr() == y.data_ptr()  # a part of a wider tensor may do so too
    if y.dtype == b_GRO.dtype == u_GNR.dtype and not torch.is_grad_enabled() and lies_there:
        y_GNO.baddbmm_(u_GNR, b_GRO)
        return y
    return torch.baddbmm(as_read(y_GNO, u_GNR.dtype), u_GNR, b_GRO).to(y.dtype).view(y.shape)


def add_mixed(y: Tensor, x: Tensor, a_KRI: Tensor, b_KRO: Tensor, weights_BTK: Tensor) -> Tensor:
    """y + the sum over adapters of weight · (x @ a.T @ b): one wide matmul down, the weights, one wide matmul up."""
    u_BTKR = mixed_down(as_read(x, a_KRI.dtype), a_KRI, weights_BTK)
    update = u_BTKR.flatten(0, 1).flatten(1) @ b_KRO.flatten(0, 1)
    return (y.to(update.dtype) + update.view(y.shape)).to(y.dtype)


def mixed_down(x: Tensor, a_KRI: Tensor, weights_BTK: Tensor, bias_KR: Tensor | None = None) -> Tensor:
    """What each adapter reads from each token, times its gate weight: [B, T, K, R]."""
    n_adapters, rank, n_features = a_KRI.shape
    u_XC = x.reshape(-1, n_features) @ a_KRI.reshape(n_adapters * rank, n_features).mT
    if bias_KR is not None:
        u_XC = u_XC + bias_KR.flatten()
    return u_XC.view(*weights_BTK.shape, rank) * weights_BTK.unsqueeze(-1)


def shares(plan: Plan, share_of: Mapping[int, float], device: torch.device) -> Tensor | None:
    """The share that each row's adapter drops, by place; None where none drops any. Made once for these rows."""

    def made() -> Tensor | None:
        found = [share_of.get(place, 0.0) for place in plan.places]
        return on_device(found, device).repeat_interleave(plan.group_size) if any(found) else None

    share_B: Tensor | None = plan.memo(("shares", device), made)
    return share_B


_MIX_1, _MIX_2, _STEP = -7046029254386353131, -4658895280553007687, 6364136223846793005


def dropped(values_GNI: Tensor, plan: Plan, share_B: Tensor, draw_B: Tensor, salt: int) -> Tensor:
    """Dropout whose mask is a function of each row's own draw, its token and the feature: neighbours change nothing.

    `share_B`: share to drop per row, where the values lie; `draw_B`: a 64-bit number per row; `salt` tells layers
    apart. What is kept is divided by the share kept.
    """
    values = values_GNI.view(plan.n_rows, -1, values_GNI.shape[-1])
    _, n_tokens, n_features = values.shape
    token_T = torch.arange(n_tokens, device=values.device) * _STEP + salt
    key_BT = _scrambled(_scrambled(draw_B.to(values.device)).unsqueeze(1) ^ token_T)
    feature_I = torch.arange(n_features, device=values.device) * _MIX_1
    noise = _scrambled(key_BT.unsqueeze(-1) + feature_I)
    uniform = (noise >> 40).to(torch.float32) / 2**24 + 0.5
    share = share_B.view(-1, 1, 1)
    kept = (uniform >= share).to(values.dtype) / (1 - share).to(values.dtype)
    return (values * kept).view(values_GNI.shape)


def _scrambled(bits: Tensor) -> Tensor:
    """Bits well mixed (the finaliser of splitmix64, on signed integers)."""
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * _MIX_2
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * _MIX_1
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)
