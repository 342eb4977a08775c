"""Row slots: keys and values of many answers at once, every row as long as its own text.

    cache = SlotCache(n_layers, device)
    cache.start(3, prefix)                       # slot 3 is a fresh row, its prefix (if any) in its first columns
    frame = cache.enter([3, 4], [7, 2])          # a forward pass over slots 3 and 4: seven new tokens, and two
    model(…, position_ids=frame.positions_RT, attention_mask=frame.mask(dtype), past_key_values=cache)
    cache.advance(frame)                         # it went well: the rows are longer now

A column is a position: token p of a row, its prefix counted, lies in column p of its slot. So one forward serves rows
of different lengths: each writes at its own end, and a mask says how far each sees. Padding of a chunk writes behind a
row's end, where nobody looks before the row's own token has overwritten it. Slots that lie side by side are read where
they lie; others are copied together first. Tensors grow as rows do, and `reset` gives the memory back.
"""

# R rows of a forward pass, T new tokens (padded on the right), S columns that are seen, H heads, D width of a head,
# X = R·H·T places that are written.

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

BLOCK = 64  # columns are allocated in multiples of it
KeysAndValues = Sequence[tuple[Tensor, Tensor]]  # by layer, each [H, n, D]


@dataclass(frozen=True)
class Frame:
    """One forward pass over some slots. positions_RT: position ids; a padded token repeats its row's last one."""

    slots: tuple[int, ...]
    counts: tuple[int, ...]
    positions_RT: Tensor
    columns_RT: Tensor
    slot_R1: Tensor
    rows: slice | Tensor
    n_seen: int
    n_columns: int
    kept: dict[int, Tensor] = field(default_factory=dict)

    def places_X(self, n_heads: int) -> Tensor:
        """Where the new tokens of so many heads lie in [rows, H, columns], flattened; worked out once."""
        if n_heads not in self.kept:
            head_H1 = torch.arange(n_heads, device=self.slot_R1.device).unsqueeze(1)
            first_RH1 = (self.slot_R1.unsqueeze(1) * n_heads + head_H1) * self.n_columns
            self.kept[n_heads] = (first_RH1 + self.columns_RT.unsqueeze(1)).flatten()
        return self.kept[n_heads]

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """What each new token sees, [R, 1, T, S] to be added to scores: 0, or the least number of `dtype`.

        window: how many tokens back a sliding layer sees, the token itself counted.
        """
        seen_S = torch.arange(self.n_seen, device=self.columns_RT.device)
        column_RT1 = self.columns_RT.unsqueeze(-1)
        hidden_RTS = seen_S > column_RT1
        if window is not None:
            hidden_RTS |= seen_S <= column_RT1 - window
        mask_RTS = torch.zeros(hidden_RTS.shape, dtype=dtype, device=hidden_RTS.device)
        return mask_RTS.masked_fill_(hidden_RTS, torch.finfo(dtype).min).unsqueeze(1)


@dataclass
class _Ground:
    """What all layers share: their size, and the forward pass that is under way."""

    dtype: torch.dtype | None = None
    n_rows: int = 0
    n_columns: int = 0
    frame: Frame | None = None


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, each [rows, H, columns, D], so that rows and heads are one axis for a `bmm`."""

    def __init__(self, ground: _Ground) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ground = ground

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for heads like these ([…, H, …, D])."""
        self.keys, self.values = self._room(key_states), self._room(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write what is new, [R, H, T, D], and give all that is seen, [R, H, S, D]."""
        frame = self._ground.frame
        if frame is None:
            raise RuntimeError("this cache is written inside SlotCache.enter … advance alone")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return _written(self.keys, key_states, frame), _written(self.values, value_states, frame)  # type: ignore[arg-type]

    def grow(self) -> None:
        """Take on the size that the ground has now."""
        if self.is_initialized:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)  # type: ignore[arg-type]

    def put(self, slot: int, keys_HND: Tensor, values_HND: Tensor) -> None:
        """Write the first columns of a slot."""
        if not self.is_initialized:
            self.lazy_initialization(keys_HND.unsqueeze(0), values_HND.unsqueeze(0))
        n_columns = keys_HND.shape[1]
        self.keys[slot, :, :n_columns] = keys_HND  # type: ignore[index]
        self.values[slot, :, :n_columns] = values_HND  # type: ignore[index]

    def put_tokens(self, slot: int, first: int, keys_NHD: Tensor, values_NHD: Tensor) -> None:
        """Write columns from `first` on, as they lie."""
        if not self.is_initialized:
            self.lazy_initialization(keys_NHD.transpose(0, 1).unsqueeze(0), values_NHD.transpose(0, 1).unsqueeze(0))
        columns = slice(first, first + len(keys_NHD))
        self.keys[slot, :, columns] = keys_NHD.transpose(0, 1)  # type: ignore[index]
        self.values[slot, :, columns] = values_NHD.transpose(0, 1)  # type: ignore[index]

    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values, where there are any yet."""
        return (self.keys, self.values) if self.is_initialized else ()  # type: ignore[return-value]

    def get_seq_length(self) -> int:
        """The columns that the forward pass under way sees before its own."""
        frame = self._ground.frame
        return 0 if frame is None else frame.n_seen - frame.positions_RT.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns seen, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No end: rows grow."""
        return -1

    def reset(self) -> None:
        """Give the memory back."""
        self.keys = self.values = None
        self.is_initialized = False

    def _room(self, like: Tensor) -> Tensor:
        shape = (self._ground.n_rows, like.shape[1], self._ground.n_columns, like.shape[3])
        return torch.zeros(shape, dtype=self._ground.dtype or like.dtype, device=like.device)

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self._ground.n_rows, old.shape[1], self._ground.n_columns, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new


class SlotCache(Cache):
    """See the head of this file. One thread, all of it under torch.inference_mode or none of it.

    dtype: of what is held; None: of what is written first.
    """

    def __init__(self, n_layers: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._ground = _Ground(dtype)
        self._slots: list[SlotLayer] = [SlotLayer(self._ground) for _ in range(n_layers)]
        super().__init__(layers=list(self._slots))
        self._device = device
        self._lengths: list[int] = []
        self._used: list[int] = []  # columns that were ever written since the slot was cleared

    @property
    def n_bytes(self) -> int:
        """Memory that is held."""
        return sum(tensor.nbytes for layer in self._slots for tensor in layer.tensors())

    def write(self, layer: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """`update` of one layer, without what transformers does around it."""
        return self._slots[layer].update(key_states, value_states)

    def length(self, slot: int) -> int:
        """Tokens of a slot's row, its prefix counted."""
        return self._lengths[slot]

    def start(self, slot: int, prefix: KeysAndValues = ()) -> None:
        """Begin a row in a free slot."""
        n_prefix = prefix[0][0].shape[1] if prefix else 0
        self._reserve(slot + 1, n_prefix)
        for layer, (keys_HND, values_HND) in zip(self._slots, prefix, strict=False):
            layer.put(slot, keys_HND, values_HND)
        self._lengths[slot] = self._used[slot] = n_prefix

    def enter(self, slots: Sequence[int], counts: Sequence[int]) -> Frame:
        """Begin a forward pass that gives row i `counts[i]` new tokens. Until `advance`, it can be done again."""
        starts = [self._lengths[slot] for slot in slots]
        n_tokens, longest = max(counts), max(starts)
        self._reserve(max(slots) + 1, longest + n_tokens)
        start_R1 = torch.tensor(starts, device=self._device).unsqueeze(1)
        columns_RT = start_R1 + torch.arange(n_tokens, device=self._device)
        positions_RT = columns_RT
        if min(counts) < n_tokens:
            positions_RT = torch.minimum(
                columns_RT, start_R1 + torch.tensor(counts, device=self._device).unsqueeze(1) - 1
            )
        slot_R1 = torch.tensor(slots, device=self._device).unsqueeze(1)
        side_by_side = all(slot == slots[0] + index for index, slot in enumerate(slots))
        frame = Frame(
            slots=tuple(slots),
            counts=tuple(counts),
            positions_RT=positions_RT,
            columns_RT=columns_RT,
            slot_R1=slot_R1,
            rows=slice(slots[0], slots[0] + len(slots)) if side_by_side else slot_R1.flatten(),
            n_seen=longest + n_tokens,
            n_columns=self._ground.n_columns,
        )
        for slot, start in zip(slots, starts, strict=True):
            self._used[slot] = max(self._used[slot], start + n_tokens)
        self._ground.frame = frame
        return frame

    def advance(self, frame: Frame) -> None:
        """The forward pass went well: its real tokens belong to their rows."""
        for slot, count in zip(frame.slots, frame.counts, strict=True):
            self._lengths[slot] += count
        self._ground.frame = None

    def copied(self, slot: int, first: int, last: int) -> tuple[Tensor, ...]:
        """A copy of a row's columns from `first` to before `last`: keys and values by layer, each [n, H, D]."""
        held = [tensor[slot, :, first:last] for layer in self._slots for tensor in layer.tensors()]
        return tuple(columns.transpose(0, 1).clone(memory_format=torch.contiguous_format) for columns in held)

    def append(self, slot: int, pieces: Sequence[Sequence[Tensor]]) -> None:
        """Let a row go on with columns that `copied` gave, piece by piece."""
        for piece in pieces:
            first, n_columns = self._lengths[slot], len(piece[0])
            self._reserve(slot + 1, first + n_columns)
            for layer, keys_NHD, values_NHD in zip(self._slots, piece[::2], piece[1::2], strict=True):
                layer.put_tokens(slot, first, keys_NHD, values_NHD)
            self._lengths[slot] += n_columns
            self._used[slot] = max(self._used[slot], self._lengths[slot])

    def clear(self, slot: int) -> None:
        """Free a slot; nothing of its row is left, so that not even a number that is none reaches the next."""
        for layer in self._slots:
            for tensor in layer.tensors():
                tensor[slot, :, : self._used[slot]].zero_()
        self._lengths[slot] = self._used[slot] = 0

    def swap(self, one: int, other: int) -> None:
        """Let the rows of two slots change places; either may be free."""
        self._reserve(max(one, other) + 1, 0)
        used = max(self._used[one], self._used[other])
        for layer in self._slots:
            for tensor in layer.tensors():
                held = tensor[one, :, :used].clone()
                tensor[one, :, :used] = tensor[other, :, :used]
                tensor[other, :, :used] = held
        for numbers in (self._lengths, self._used):
            numbers[one], numbers[other] = numbers[other], numbers[one]

    def reset(self) -> None:
        """Forget every row and give the memory back."""
        for layer in self._slots:
            layer.reset()
        self._ground.n_rows = self._ground.n_columns = 0
        self._ground.frame = None
        self._lengths, self._used = [], []

    def _reserve(self, n_rows: int, n_columns: int) -> None:
        """Grow to hold so many rows and columns; by more than is asked, so that growing stays rare."""
        ground = self._ground
        if n_rows <= ground.n_rows and n_columns <= ground.n_columns:
            return
        if n_rows > ground.n_rows:
            ground.n_rows = max(n_rows, min(2 * ground.n_rows, ground.n_rows + 8))
        if n_columns > ground.n_columns:
            wanted = max(n_columns, ground.n_columns + ground.n_columns // 2)
            ground.n_columns = -(-wanted // BLOCK) * BLOCK
        for numbers in (self._lengths, self._used):
            numbers += [0] * (ground.n_rows - len(numbers))
        for layer in self._slots:
            layer.grow()


def _written(held: Tensor, new_RHTD: Tensor, frame: Frame) -> Tensor:
    n_heads, width = new_RHTD.shape[1], new_RHTD.shape[3]
    new_XD = new_RHTD.reshape(-1, width).to(held.dtype)
    held.view(-1, width).index_copy_(0, frame.places_X(n_heads), new_XD)
    return held[frame.rows, :, : frame.n_seen]
