"""K adapters on one frozen base, in one forward and backward pass; a row of a batch names the adapter that owns it.

    stack = Stack(base.model, base_hash=base.hash)
    stack.add("casual", Path("runs/casual_chat/adapters/casual_chat"))     # from a folder, to answer
    stack.add("trial-3", new_adapter(base.model, options, seed=0), learns=True)
    logits = stack(input_ids, stack.owners(["casual", None, "trial-3"]), attention_mask=mask).logits

A row equals the same row computed with its adapter alone. A row of the base (-1, or None by name) has the base's own
bits where no row of the batch has a prefix, and beside a prefix, whose masked columns change the order of sums, its
numbers to 2e-6. The base is frozen and its own parameters stay where they are; with no adapter on it nothing hangs on
it. One thread at a time may use a stack.
"""

# B rows, T new tokens, S tokens so far (cached and new, without prefixes), K adapters.

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.adapters import anatomy
from toolkit.adapters.contract import freeze
from toolkit.errors import AdapterError
from toolkit.stack.adapter import KINDS, Adapter, read_adapter, write_adapter
from toolkit.stack.calls import checked_owners, prepared
from toolkit.stack.embedding import EmbeddingShelf
from toolkit.stack.grouped import Mix, Plan, plan_rows
from toolkit.stack.lora import LoraShelf
from toolkit.stack.prefix import PrefixShelf
from toolkit.stack.reft import ReftShelf
from toolkit.stack.shelf import Now, Room, Shelf

BASE = -1
N_PLANS = 8  # batches whose plan is remembered: one prefill and one decode of several servers, a training step
Owners = Tensor | Sequence[int]


@dataclass(frozen=True)
class Gates:
    """Weights per token over lora and reft adapters, whose updates are summed inside each layer.

    weights: [B, T, K] in the order of `adapters`, or a function that gives them for a decoder layer by its number (None
    for a layer outside the decoder's), called when that layer runs.
    """

    adapters: tuple[str, ...]
    weights: Tensor | Callable[[int | None], Tensor]


@dataclass(frozen=True)
class Ready:
    """An adapter that a stack has read and checked; see Stack.read."""

    adapter: Adapter
    hash: str = ""


class Stack:
    """See the head of this file.

    base_hash: as LoadedBase has it; folders made for another base are refused. dtype: of the adapters' weights and
    arithmetic. rows_apart: multiply every row on its own, so that the order of every sum is that of the row alone
    (slower where an adapter has several rows). keep_mb: how much memory may hold weights gathered for batches that come
    again.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        base_hash: str = "",
        dtype: torch.dtype = torch.float32,
        rows_apart: bool = False,
        keep_mb: int = 512,
    ) -> None:
        if hasattr(base, "peft_config"):
            raise AdapterError("This model already has an adapter. Detach it, or load the base again.")
        anatomy.pin_quantised_numbers(base)
        freeze(base)
        self.base, self.base_hash, self.rows_apart, self.dtype = base, base_hash, rows_apart, dtype
        self._room = Room(keep_mb * 2**20)
        self.prefixes = PrefixShelf(base, dtype, self._room)
        self.loras = LoraShelf(base, dtype, self._room)
        self._refts = ReftShelf(base, dtype, self._room)
        self._embeddings = EmbeddingShelf(base, dtype, self._room)
        made: tuple[Shelf, ...] = (self.loras, self.prefixes, self._refts, self._embeddings)
        self._shelves = {shelf.kind: shelf for shelf in made}
        self._slots: dict[str, int] = {}
        self._kinds: dict[str, str] = {}
        self._hashes: dict[str, str] = {}
        self._plans: OrderedDict[tuple[tuple[int, ...], bool], dict[str, Plan | None]] = OrderedDict()
        self._mixes: dict[tuple[str, tuple[int, ...], bool], dict[Any, Any]] = {}
        self.takes_positions = "position_ids" in inspect.signature(base.forward).parameters

    # Membership

    @property
    def slots(self) -> Mapping[str, int]:
        """Every adapter's name and the number that names it in `owner`."""
        return MappingProxyType(self._slots)

    def read(self, name: str, folder: Path) -> Ready:
        """The adapter in a folder, read, checked and hashed: most of the time that `add` takes. The stack is as it was,
        and another thread may be at work with it. Raises: AdapterError where the adapter does not fit the base.
        """
        found = self._checked(name, folder)
        return Ready(found, found.hash)

    def add(self, name: str, adapter: Adapter | Path | Ready, *, learns: bool = False) -> int:
        """Take an adapter in and return its slot, which is its own until it is removed. The others are not touched.

        Raises: AdapterError when the name is taken, or the adapter does not fit the base; then nothing has changed.
        """
        if name in self._slots:
            raise AdapterError(
                f"{name}: this stack already has an adapter of that name. Replace it, or choose another."
            )
        taken = set(self._slots.values())
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        ready = adapter if isinstance(adapter, Ready) else Ready(self._checked(name, adapter))
        self._put(name, slot, ready, learns)
        return slot

    def replace(self, name: str, adapter: Adapter | Path, *, learns: bool = False) -> int:
        """Put another adapter, of any kind, in the place of one, at the same slot. After an error the old one stays."""
        slot = self._slot(name)
        new = self._checked(name, adapter)
        self.remove(name)
        self._put(name, slot, Ready(new), learns)
        return slot

    def remove(self, name: str) -> None:
        """Let an adapter go; its slot is free."""
        slot = self._slot(name)
        self._shelves[self._kinds.pop(name)].take(slot)
        del self._slots[name]
        self._hashes.pop(name, None)
        self._forget_plans()

    def close(self) -> None:
        """Remove every adapter: the base is as it was."""
        for name in list(self._slots):
            self.remove(name)

    def adapter(self, name: str) -> Adapter:
        """An adapter as it is now: what its folder would hold."""
        slot = self._slot(name)
        return self._shelves[self._kinds[name]].adapter(slot)

    def save(self, name: str, folder: Path, *, base: str = "") -> None:
        """Write an adapter into a fresh folder, as its kind does."""
        write_adapter(self.adapter(name), folder, self.base, base=base, base_hash=self.base_hash)

    def hash(self, name: str) -> str:
        """Sha256 of an adapter's weights; that of one that learns changes with them."""
        if name not in self._hashes or self.learning(name):
            self._hashes[name] = self.adapter(name).hash
        return self._hashes[name]

    def owners(self, names: Sequence[str | None]) -> Tensor:
        """Slots by name; None is the base."""
        return torch.tensor([BASE if name is None else self._slot(name) for name in names], dtype=torch.long)

    # Forward

    def __call__(
        self,
        input_ids: Tensor,
        owner: Owners,
        *,
        gates: Gates | None = None,
        draws: Tensor | None = None,
        **given: Any,
    ) -> Any:
        """The base's output for rows of several adapters. `given` is what the base itself takes, as for the base alone:

        attention_mask [B, S] (padding 0, on either side; cached tokens included, prefixes not), position_ids (counted
        without prefixes), past_key_values (an empty cache, or one that this stack filled for the same owners),
        use_cache (default: only where a cache was given or a row has a prefix). `gates`: added to what the owner does;
        for rows that no adapter owns. `draws` [B]: a 64-bit number per row that the dropout of its adapter follows
        from; None: no dropout.
        Raises: AdapterError for an owner that is none, weights of another shape, labels (a loss is per adapter), packed
        rows beside prefixes, and what would be silently wrong.
        """
        if self.base.training and torch.is_grad_enabled() and self._is_checkpointing():
            raise AdapterError(
                "Activation checkpointing runs layers again when the stack no longer knows whose rows they were. Turn "
                "it off, or call the base and backward inside `with stack.routed(owner):`."
            )
        with self.routed(owner, gates=gates, draws=draws, n_tokens=input_ids.shape[1]):
            return self.base(**self.prepare(input_ids, owner, **given))

    def prepare(self, input_ids: Tensor, owner: Owners, **given: Any) -> dict[str, Any]:
        """What the base has to be called with inside `routed`: prefixes in the cache, mask and positions to match."""
        owners = self._checked_owners(owner, len(input_ids))
        plan = self._plans_of(owners)["prefix"]
        return prepared(self.prefixes, plan, input_ids, given, takes_positions=self.takes_positions)

    @contextmanager
    def routed(
        self,
        owner: Owners,
        *,
        gates: Gates | None = None,
        draws: Tensor | None = None,
        n_tokens: int | None = None,
    ) -> Iterator[None]:
        """Inside, whatever is called on the base treats row i as owner[i]'s: lora, reft and embedding act on their own.

        Prefixes do not: the cache, mask and positions given to the base have to hold them (`prepare`, or
        `keys_and_values`).
        """
        owners = self._checked_owners(owner, None)
        plans = self._plans_of(owners)
        mixes = {} if gates is None else self._mixes_of(gates, len(owners), n_tokens)
        draws = None if draws is None else draws.to(anatomy.device_of(self.base))  # once, not in every layer
        before = {kind: shelf.now for kind, shelf in self._shelves.items()}
        for kind, shelf in self._shelves.items():
            plan, mix = plans[kind], mixes.get(kind)
            shelf.now = None if plan is None and mix is None else Now(plan, mix, draws)
        try:
            yield
        finally:
            for kind, shelf in self._shelves.items():
                shelf.now = before[kind]

    def start(self, owner: Owners) -> Any:
        """A fresh cache of the base that holds each row's prefix."""
        owners = self._checked_owners(owner, None)
        plan, cache = self._plans_of(owners)["prefix"], self.prefixes.new_cache()
        if plan is not None:
            self.prefixes.fill(cache, plan, max(self.prefixes.widths(plan, len(owners))))
        return cache

    def n_prefix(self, owner: Owners) -> list[int]:
        """How many positions each row's prefix takes."""
        owners = self._checked_owners(owner, None)
        return self.prefixes.widths(self._plans_of(owners)["prefix"], len(owners))

    def keys_and_values(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """A prefix by layer, keys and values each [heads, n, width of a head]; empty for the other kinds."""
        slot = self._slot(name)
        return self.prefixes.keys_and_values(slot) if self._kinds[name] == "prefix" else []

    def update(self, module: str, x: Tensor, y: Tensor) -> Tensor:
        """Inside `routed`: what the linear layer named gives, where the base's gave `y` for `x`; for forward passes
        written by hand, which call no module. `y` may be changed in place where no gradient is wanted."""
        return self.loras.update(module, x, y)

    def update_parts(self, modules: Sequence[str], x: Tensor, y: Tensor, widths: Sequence[int]) -> None:
        """The same for several layers that read the same x; their outputs lie beside each other in y, so wide each, and
        are changed in place. No gradients.
        """
        self.loras.update_parts(modules, x, y, widths)

    def embedded(self, ids: Tensor, x: Tensor) -> Tensor:
        """Inside `routed`: what the input embedding gives, where the base's gave `x` for these token ids."""
        return self._embeddings.embedded(ids, x)

    def edited(self, layer: int, hidden: Tensor) -> Tensor:
        """Inside `routed`: what a decoder layer gives, where the base's gave this."""
        return self._refts.edited(layer, hidden)

    # Learning

    def learning(self, name: str) -> dict[str, Tensor]:
        """The leaves of an adapter that learns, by their names in its folder; empty for one that was added to answer.

        Each is a view into a dense tensor and stays the same object while others come and go: give them to an
        optimizer of the adapter's own. Their gradients come from this adapter's rows alone.
        """
        slot = self._slot(name)
        return self._shelves[self._kinds[name]].leaves(slot)

    def dense(self, kind: str) -> dict[str, Tensor]:
        """The dense leaves [places, …] of a kind that learn, with their gradients; new objects after add and replace.

        An optimizer over these steps all adapters at once; `place` says where each lies in the first axis. Padding and
        places that are free have zero gradients.
        """
        return {key: table.dense for key, table in self._shelves[kind].tables.items() if table.dense.requires_grad}

    def place(self, name: str) -> int:
        """Where an adapter lies in the first axis of the dense tensors of its kind."""
        slot = self._slot(name)
        return self._shelves[self._kinds[name]].places[slot]

    def zero_grad(self, names: Sequence[str] | None = None) -> None:
        """Gradients of these adapters, or of all, become zero."""
        slots = {name: self._slot(name) for name in (self._slots if names is None else names)}
        for kind, shelf in self._shelves.items():
            shelf.zero_grad([slot for name, slot in slots.items() if self._kinds[name] == kind])

    # Inside

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            there = ", ".join(sorted(self._slots)) or "nothing"
            raise AdapterError(f"{name}: this stack has no adapter of that name. It holds {there}.")
        return self._slots[name]

    def _checked(self, name: str, adapter: Adapter | Path) -> Adapter:
        try:
            found = adapter
            if isinstance(found, Path):
                found = read_adapter(found, self.base, base_hash=self.base_hash)
            if found.kind not in KINDS:
                raise AdapterError(f"no stack can hold kind {found.kind}. Use one of: {', '.join(KINDS)}.")
            odd = [key for key, value in found.tensors.items() if not bool(value.isfinite().all())]
            if odd:
                raise AdapterError(f"{odd[0]} holds values that are not finite. Use an earlier checkpoint.")
            self._shelves[found.kind].check(found)
        except AdapterError as error:
            raise type(error)(f"{name}: {error}") from error
        return found

    def _put(self, name: str, slot: int, ready: Ready, learns: bool) -> None:
        adapter = ready.adapter
        self._shelves[adapter.kind].put(slot, adapter, learns=learns)
        self._slots[name], self._kinds[name] = slot, adapter.kind
        if not learns and not adapter.is_raw:
            self._hashes[name] = ready.hash or adapter.hash
        self._forget_plans()

    def _is_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules())

    def _checked_owners(self, owner: Owners, n_rows: int | None) -> tuple[int, ...]:
        return checked_owners(owner, n_rows, self._slots)

    def _forget_plans(self) -> None:
        self._mixes.clear()
        self.loras.forget()
        while self._plans:
            self._drop_oldest_plan()

    def _drop_oldest_plan(self) -> None:
        _, plans = self._plans.popitem(last=False)
        self._room.n_bytes += sum(plan.all_kept_bytes for plan in plans.values() if plan is not None)

    def _plans_of(self, owners: tuple[int, ...]) -> dict[str, Plan | None]:
        key = (owners, torch.is_inference_mode_enabled())
        if key not in self._plans:
            self._plans[key] = {
                kind: plan_rows([shelf.places.get(owner, 0) for owner in owners], apart=self.rows_apart)
                for kind, shelf in self._shelves.items()
            }
            if len(self._plans) > N_PLANS:
                self._drop_oldest_plan()
        self._plans.move_to_end(key)
        return self._plans[key]

    def _mixes_of(self, gates: Gates, n_rows: int, n_tokens: int | None) -> dict[str, Mix]:
        slots = [self._slot(name) for name in gates.adapters]
        wrong = [name for name in gates.adapters if not self._shelves[self._kinds[name]].can_mix]
        if wrong or not slots or len(set(slots)) != len(slots):
            which = f"{wrong[0]} is of kind {self._kinds[wrong[0]]}" if wrong else "it names none, or one twice"
            raise AdapterError(f"gates: weights per token stand over different lora and reft adapters; {which}.")

        def weights(layer: int | None) -> Tensor:
            given = gates.weights if isinstance(gates.weights, Tensor) else gates.weights(layer)
            fits = given.dim() == 3 and given.shape[0] == n_rows and given.shape[2] == len(slots)
            if not fits or (n_tokens is not None and given.shape[1] != n_tokens):
                raise AdapterError(
                    f"gates: weights are {tuple(given.shape)} where {n_rows} rows, {n_tokens or 'their'} tokens and "
                    f"{len(slots)} adapters ({', '.join(gates.adapters)}) need ({n_rows}, {n_tokens or 'T'}, "
                    f"{len(slots)})."
                )
            return given

        if isinstance(gates.weights, Tensor):
            weights(None)
        places = {kind: tuple(shelf.places.get(slot, 0) for slot in slots) for kind, shelf in self._shelves.items()}
        return {kind: Mix(found, weights, self._kept_of(kind, found)) for kind, found in places.items() if any(found)}

    def _kept_of(self, kind: str, places: tuple[int, ...]) -> dict[Any, Any]:
        key = (kind, places, torch.is_inference_mode_enabled())
        if key not in self._mixes and len(self._mixes) >= 2 * N_PLANS:
            self._mixes.clear()
        return self._mixes.setdefault(key, {})
