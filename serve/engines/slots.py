"""Rows of many adapters on one base, in slots: whatever rows are asked for take their next tokens in one forward pass.

The base runs (serve/engines/forward.py: by its own modules, or by hand where its family is known), the stack adds each
row's adapter, serve/cache.py keeps what the rows have read. What a base needs for that is checked when it is opened, by
`unfit`: first by name, then on a few tokens.
"""

# R rows of a forward pass, A of them asked about, T new tokens (padded on the right), V vocabulary.

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serve.cache import Frame, SlotCache
from serve.engines.forward import AUTO, LEAN, MODULES, Forward, Masks, ModulesForward
from serve.engines.fusing import refuse_int8, unlike
from serve.engines.int8 import FLAG
from serve.engines.lean import LeanForward
from serve.engines.reuse import Columns
from serve.engines.threads import TRIED_ROWS, Wakes, quickest
from toolkit.adapters import anatomy
from toolkit.combine.gate import Gate, Reader
from toolkit.errors import BaseError
from toolkit.stack.stack import BASE, Stack

_log = logging.getLogger("maltu.serve.slots")
FULL, SLIDING = "full_attention", "sliding_attention"
ONE_ANSWER_FOR_ALL = ("dynamic", "longrope")  # rotary embeddings that follow the longest row of a batch
CLOSE = 1e-4  # of the largest logit: what rounding explains
READ_FIRST = 32  # tokens of a row, before steps are tried
FREE_MB = 64  # an empty cache above it gives its memory back


@dataclass(eq=False)
class Seat:
    """A row's place; it moves as others come and go. adapter: its name in the stack, None for the base. gate: weighs
    adapters of the stack for every token of a row of the base. n_prefix: columns before its first token.
    """

    adapter: str | None
    owner: int
    slot: int
    gate: Gate | None = None
    n_prefix: int = 0


class Slots:
    """See the head of this file. One thread; every call under torch.inference_mode.

    forward: modules, lean, or auto: lean where the base's family is known and a few tokens come out as its modules have
    them. int8: lean with weights in eight bits, for a stack in float64; never modules. Raises BaseError where lean, or
    int8, does not fit the base.
    Rows that have settled (the ones that write) lie side by side from slot 0 on, so that they are read in place.
    """

    def __init__(self, stack: Stack, forward: str = AUTO, *, int8: bool = False) -> None:
        if int8:
            _refuse_int8(stack, forward)
        self.stack, self.is_int8 = stack, int8
        self.forward_name = LEAN if int8 else forward
        if self.forward_name == AUTO:
            self.forward_name = LEAN if unlike(stack.base) is None else MODULES
        config = anatomy.text_config(stack.base)
        weight: Any = anatomy.input_embeddings(stack.base).weight
        self._device, self._dtype = weight.device, weight.dtype
        self._window = anatomy.sliding_window(stack.base)
        self._is_mixed = len(set(getattr(config, "layer_types", None) or ())) > 1
        self.sums = torch.float64 if int8 else self._dtype  # of attention
        self.cache = SlotCache(config.num_hidden_layers, self._device, torch.float64 if int8 else None)
        self._forward: Forward = ModulesForward(stack, self.cache)
        if self.forward_name == LEAN:
            self._forward = LeanForward(stack, self.cache, int8=int8)
        self._seats: dict[int, Seat] = {}
        self._n_settled = 0
        if forward == AUTO and self.forward_name == LEAN and not int8 and (off := largest_difference(self)) >= CLOSE:
            _log.warning("its modules serve this base: the lean forward pass differs by %.2g of the logits", off)
            self.forward_name, self._forward = MODULES, ModulesForward(stack, self.cache)

    def __len__(self) -> int:
        """Rows that are there."""
        return len(self._seats)

    def few_threads(self) -> AbstractContextManager[None]:
        """Inside, everything runs on one thread but for what `tune` found to be worth all of them."""
        if isinstance(self._forward, LeanForward) and self._forward.tried:
            return self._forward.team.one()
        return nullcontext()

    @torch.inference_mode()
    def tune(self) -> None:
        """Try what of a step is worth waking threads for; lean alone. The slots are empty before and after. Takes up to
        39 steps.
        """
        if not isinstance(self._forward, LeanForward) or self._forward.team.size == 1:
            return
        tried, found = self._forward.tried, dict[int, Wakes]()
        for n_rows in TRIED_ROWS:
            seats = [self.open(None) for _ in range(n_rows)]
            self.forward(seats, [[1] * READ_FIRST] * n_rows)

            def step(wakes: Wakes, seats: Sequence[Seat] = seats) -> None:
                tried[len(seats)] = wakes
                with self.few_threads():
                    self.forward(seats, [[1]] * len(seats))

            found[n_rows] = quickest(step)
            tried.clear()
            self.reset()
        tried |= found

    @property
    def computes(self) -> str:
        """The forward pass, in words."""
        how = "the lean forward pass" if self.forward_name == LEAN else "transformers' modules"
        return f"{how}, {self._device}, {'int8' if self.is_int8 else str(self._dtype).removeprefix('torch.')}"

    def open(self, adapter: str | None, gate: Gate | None = None) -> Seat:
        """A row of its own for a new answer by this adapter, or by those that a gate weighs."""
        slot = next(slot for slot in range(self._n_settled, len(self._seats) + 1) if slot not in self._seats)
        prefix = () if adapter is None else self.stack.keys_and_values(adapter)
        seat = Seat(adapter, BASE if adapter is None else self.stack.slots[adapter], slot, gate)
        self.cache.start(slot, prefix)
        seat.n_prefix = self.cache.length(slot)
        self._seats[slot] = seat
        return seat

    def settle(self, seat: Seat) -> None:
        """A row has read its prompt and will take one token after the other: it moves to where the others do."""
        if seat.slot >= self._n_settled:
            self._swap(seat.slot, self._n_settled)
            self._n_settled += 1

    def n_tokens(self, seat: Seat) -> int:
        """How much of its text a row has read."""
        return self.cache.length(seat.slot) - seat.n_prefix

    def copied(self, seat: Seat, first: int, last: int) -> Columns:
        """A copy of the keys and values of a row's tokens from `first` to before `last`."""
        return self.cache.copied(seat.slot, seat.n_prefix + first, seat.n_prefix + last)

    def recall(self, seat: Seat, pieces: Sequence[Columns]) -> None:
        """Let a row go on as if it had read tokens whose keys and values these are, `copied` from another row of the
        same adapter at the same place in its text.
        """
        self.cache.append(seat.slot, pieces)

    def close(self, seat: Seat) -> None:
        """A row is over. Harmless for one that is not there."""
        if self._seats.get(seat.slot) is not seat:
            return
        if seat.slot < self._n_settled:
            self._n_settled -= 1
            self._swap(seat.slot, self._n_settled)
        self.cache.clear(seat.slot)
        del self._seats[seat.slot]
        if not self._seats and self.cache.n_bytes > FREE_MB * 2**20:
            self.cache.reset()

    def reset(self) -> None:
        """Forget every row."""
        self._seats, self._n_settled = {}, 0
        self.cache.reset()

    def forward(
        self, seats: Sequence[Seat], ids: Sequence[Sequence[int]], asked: Sequence[bool] | None = None
    ) -> Tensor:
        """Give each row its next tokens; what follows the last of them, for the rows that are asked about (all, where
        nothing is said), in their order, [A, V]. After an exception nothing has changed.

        Cheapest for seats in the order of their slots, with as many tokens each. All have the same gate, or all none.
        """
        counts = [len(row) for row in ids]
        n_tokens = max(counts)
        frame = self.cache.enter([seat.slot for seat in seats], counts)
        ids_RT = torch.tensor([[*row, *[0] * (n_tokens - len(row))] for row in ids], device=self._device)
        rows = [row for row in range(len(seats)) if asked is None or asked[row]]
        with self._routed(seats, n_tokens) as reader:
            logits_AV = self._forward(ids_RT, frame, self._masks(frame), rows, reader)
        self.cache.advance(frame)
        return logits_AV

    @contextmanager
    def _routed(self, seats: Sequence[Seat], n_tokens: int) -> Iterator[Reader | None]:
        """Inside, the base answers for each row as its adapter, or its gate, would have it. Gives the gate's reader."""
        owners, gate = [seat.owner for seat in seats], seats[0].gate
        if gate is None:
            with self.stack.routed(owners, n_tokens=n_tokens):
                yield None
            return
        with gate.reader(self.stack) as reader:
            with self.stack.routed(owners, gates=reader.gates, n_tokens=n_tokens):
                yield reader

    def _masks(self, frame: Frame) -> Masks:
        if not self._is_mixed:
            return frame.mask(self.sums, self._window)
        return {FULL: frame.mask(self.sums), SLIDING: frame.mask(self.sums, self._window)}

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        self.cache.swap(one, other)
        moved = {one: self._seats.pop(other, None), other: self._seats.pop(one, None)}
        for slot, seat in moved.items():
            if seat is not None:
                seat.slot = slot
                self._seats[slot] = seat


def _refuse_int8(stack: Stack, forward: str) -> None:
    """Raises BaseError where eight bits do not fit; what is rounded is a forward pass that agrees with the modules."""
    refuse_int8(stack.base)
    if forward == MODULES:
        raise BaseError(f"{FLAG} is computed by the lean forward pass. Leave out --forward {MODULES}, or {FLAG}.")
    if stack.dtype != torch.float64:
        raise ValueError("in eight bits the adapters of a stack are in float64")
    if forward == AUTO and Slots(stack, AUTO).forward_name != LEAN:
        raise BaseError(f"{FLAG}: the lean forward pass differs from the modules of this base. Leave it out.")


def unfit(stack: Stack) -> str | None:
    """Why rows of this base cannot share a batch in slots, or None where they can. Costs a few tiny forward passes."""
    config, base = anatomy.text_config(stack.base), stack.base
    takes = inspect.signature(base.forward).parameters
    kinds = set(getattr(config, "layer_types", None) or ())
    turning = {str(word) for word in _turning(getattr(config, "rope_parameters", None))}
    if other := kinds - {FULL, SLIDING}:
        return f"it has layers of {', '.join(sorted(other))}, which keep no keys and values by position"
    if not {"past_key_values", "position_ids"} <= takes.keys():
        return "its forward pass takes no cache, or no positions"
    if getattr(config, "num_kv_shared_layers", None):
        return "its layers share caches"
    if getattr(config, "_attn_implementation", "eager") not in ("eager", "sdpa"):
        return f"its attention ({config._attn_implementation}) takes no mask per row"
    if turning & set(ONE_ANSWER_FOR_ALL):
        return "its rotary embeddings depend on the longest row of a batch"
    try:
        off = largest_difference(Slots(stack, MODULES))
    except Exception as error:  # whatever a model does not like about slots
        return f"it does not run in slots ({type(error).__name__}: {str(error)[:200]})"
    return None if off < 1e-2 else f"its rows differ in slots from what they are alone (by {off:.2g} of the logits)"


@torch.inference_mode()
def largest_difference(slots: Slots) -> float:
    """How far two rows of different lengths, read in chunks and beside each other, are from the base alone, as a share
    of the largest logit. The slots are empty before and after.
    """
    stack = slots.stack
    vocabulary = int(anatomy.text_config(stack.base).vocab_size)
    texts = [[(7 * place + 3) % vocabulary for place in range(length)] for length in (7, 4)]
    seats = [slots.open(None) for _ in texts]
    slots.forward(seats, [texts[0][:4], texts[1][:2]])
    slots.forward(seats, [texts[0][4:6], texts[1][2:3]])
    both_RV = slots.forward(seats, [text[-1:] for text in texts]).float()
    worst = 0.0
    for index, text in enumerate(texts):
        ids = torch.tensor([text], device=both_RV.device)
        alone_V = stack.base(input_ids=ids, use_cache=False).logits[0, -1].float()
        worst = max(worst, ((both_RV[index] - alone_V).abs().max() / alone_V.abs().max().clamp(min=1e-6)).item())
    slots.reset()
    return worst


def _turning(rope: Any) -> Iterator[Any]:
    """The types of rotary embedding in a config: one, or one for each type of layer."""
    if isinstance(rope, dict):
        yield rope.get("rope_type", "default")
        for inner in rope.values():
            yield from _turning(inner)
