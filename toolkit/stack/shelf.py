"""What one kind of adapter does in a stack: the contract that the shelves of lora, prefix, reft and embedding keep.

A shelf holds all adapters of its kind on one base, in tables, each at a place of its own; place 0 is no adapter. The
stack tells it before a forward pass which places the rows are served from (`now`), and its hooks on the base do the
rest. With nothing on it, a shelf leaves no trace on the base.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from toolkit.adapters import anatomy
from toolkit.errors import AdapterError
from toolkit.stack.adapter import Adapter
from toolkit.stack.grouped import Mix, Plan
from toolkit.stack.table import Table


@dataclass(frozen=True)
class Now:
    """What a forward pass asks of a shelf; `draw_B`: a number per row that dropout follows from, None: no dropout."""

    plan: Plan | None
    mix: Mix | None = None
    draw_B: Tensor | None = None


@dataclass
class Room:
    """How many more bytes may be spent on keeping what was gathered for batches that come again."""

    n_bytes: int


class Shelf(ABC):
    """See the head of this file. `can_mix`: whether gate weights per token mean something for the kind."""

    kind: ClassVar[str]
    can_mix: ClassVar[bool] = False

    def __init__(self, model: Any, dtype: torch.dtype, room: Room) -> None:
        self.model, self.dtype, self.room = model, dtype, room
        self.now: Now | None = None
        self.places: dict[int, int] = {}
        self.tables: dict[str, Table] = {}
        self._names: dict[int, dict[str, str]] = {}
        self._configs: dict[int, Mapping[str, Any]] = {}
        self._types: dict[int, dict[str, torch.dtype]] = {}
        self._learning: set[int] = set()

    @abstractmethod
    def check(self, adapter: Adapter) -> None:
        """Raise AdapterError, with names and shapes, unless the adapter fits this base."""

    @abstractmethod
    def layout(self, adapter: Adapter) -> dict[str, str]:
        """Which of the adapter's tensors goes into which table."""

    @abstractmethod
    def make_table(self, key: str) -> Table:
        """A new table, and the hook on the base that reads it."""

    def drop_table(self, key: str) -> None:  # noqa: B027  (a shelf without hooks has nothing to undo)
        """Undo what `make_table` did to the base; the table is empty."""

    def place_more(self, place: int, adapter: Adapter) -> None:  # noqa: B027  (most kinds are tensors alone)
        """Note what an adapter needs beside its tensors."""

    def put(self, slot: int, adapter: Adapter, *, learns: bool) -> None:
        """Take an adapter in. It was checked."""
        place = next(place for place in range(1, len(self.places) + 2) if place not in self._names)
        layout = self.layout(adapter)
        try:
            for name, key in layout.items():
                if key not in self.tables:
                    self.tables[key] = self.make_table(key)
                self.tables[key].put(place, adapter.tensors[name], learns=learns)
        except BaseException:  # memory: nothing half put in stays
            self._empty(place, layout)
            raise
        self._names[place], self._configs[place], self.places[slot] = layout, adapter.config, place
        for table in self.tables.values():
            table.have_places(max(self._names) + 1)
        self._types[place] = {} if learns else {name: adapter.tensors[name].dtype for name in layout}
        if learns:
            self._learning.add(place)
        self.place_more(place, adapter)

    def take(self, slot: int) -> None:
        """Let an adapter go; its place is zeros again and free."""
        place = self.places.pop(slot)
        self._empty(place, self._names.pop(place))
        del self._configs[place], self._types[place]
        self._learning.discard(place)

    def _empty(self, place: int, layout: Mapping[str, str]) -> None:
        for key in set(layout.values()) & self.tables.keys():
            table = self.tables[key]
            table.clear(place)
            if table.is_empty:
                self.drop_table(key)
                del self.tables[key]

    def adapter(self, slot: int) -> Adapter:
        """An adapter as it would be saved now; one that does not learn in the precision it came in."""
        place = self.places[slot]
        types = self._types[place]
        tensors = {
            name: self.tables[key].value(place).to("cpu", types.get(name)) for name, key in self._names[place].items()
        }
        return Adapter(self.kind, tensors, self._configs[place])

    def leaves(self, slot: int) -> dict[str, Tensor]:
        """What an optimizer changes, by the names of the folder; empty where the adapter does not learn."""
        place = self.places[slot]
        if place not in self._learning:
            return {}
        return {name: self.tables[key].leaf(place) for name, key in self._names[place].items()}

    def zero_grad(self, slots: Iterable[int]) -> None:
        """The gradients of these adapters become zero, in one call for all tables."""
        places = {self.places[slot] for slot in slots}
        keys = {key for place in places for key in self._names[place].values()}
        parts = [part for key in keys for part in self.tables[key].gradients(places)]
        if parts:
            torch._foreach_zero_(parts)

    @property
    def learns(self) -> bool:
        """Whether any adapter here learns."""
        return bool(self._learning)


def refuse_misfit(what: str, wrong: list[str]) -> None:
    """Raise AdapterError naming what does not fit, if anything does not."""
    if wrong:
        more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
        raise AdapterError(
            f"this {what} adapter does not fit the base: {'; '.join(wrong[:4])}{more}. Load the base it was trained on."
        )


def layer_numbers(model: Any) -> dict[str, int]:
    """The names of the decoder layers with their numbers; empty where the layers cannot be told."""
    try:
        layers = {id(layer): index for index, layer in enumerate(anatomy.decoder_layers(model))}
    except AdapterError:
        return {}
    return {name: layers[id(module)] for name, module in model.named_modules() if id(module) in layers}


def holding_layer(layers: Mapping[str, int], name: str) -> str | None:
    """The name of the decoder layer, of those that `layer_numbers` gives, that a module lies in."""
    parts = name.split(".")
    return next((layer for n in range(1, len(parts)) if (layer := ".".join(parts[:n])) in layers), None)


def in_expert_list(layers: Mapping[str, int], name: str) -> bool:
    """Whether a module lies in a list inside a decoder layer: an expert that sees routed tokens, not rows."""
    layer = holding_layer(layers, name)
    return layer is not None and any(part.isdigit() for part in name[len(layer) + 1 :].split("."))
