"""Embedding adapters in a stack: the deltas of all of them in one table, and which row of it a token adds."""

# B rows, T tokens, V vocabulary, N learning tokens, H hidden, P places.

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from toolkit.adapters import anatomy
from toolkit.errors import AdapterError
from toolkit.stack.adapter import Adapter
from toolkit.stack.shelf import Room, Shelf, refuse_misfit
from toolkit.stack.table import Table

IDS, DELTA = "token_ids", "delta"


class EmbeddingShelf(Shelf):
    """See the head of this file."""

    kind: ClassVar[str] = "embedding"

    def __init__(self, model: Any, dtype: torch.dtype, room: Room) -> None:
        super().__init__(model, torch.float32, room)  # deltas are kept in float32, as the kind keeps them
        del dtype
        self._table = anatomy.input_embeddings(model)
        self._ids: dict[int, Tensor] = {}
        self._row_PV = torch.zeros(0)
        self._handle: RemovableHandle | None = None

    def check(self, adapter: Adapter) -> None:
        """See Shelf.check."""
        vocabulary, hidden = self._table.weight.shape  # type: ignore[misc]
        ids, delta = adapter.tensors.get(IDS), adapter.tensors.get(DELTA)
        wrong = sorted(adapter.tensors.keys() ^ {IDS, DELTA})
        if ids is not None and delta is not None:
            if delta.dim() != 2 or tuple(delta.shape) != (ids.numel(), hidden):
                wrong.append(f"delta is {tuple(delta.shape)} where {(ids.numel(), int(hidden))} fits")
            if ids.dtype != torch.long or ids.dim() != 1 or not bool(((ids >= 0) & (ids < vocabulary)).all()):
                wrong.append(f"its token ids do not fit a vocabulary of {vocabulary}")
            elif len(set(ids.tolist())) != ids.numel():
                wrong.append("a token id stands twice")
        refuse_misfit(self.kind, wrong)

    def layout(self, adapter: Adapter) -> dict[str, str]:
        """See Shelf.layout."""
        del adapter
        return {DELTA: DELTA}

    def make_table(self, key: str) -> Table:
        """See Shelf.make_table."""
        del key
        self._handle = self._table.register_forward_hook(self._on_output)
        return Table(anatomy.device_of(self.model), self.dtype)

    def drop_table(self, key: str) -> None:
        """See Shelf.drop_table."""
        del key
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def place_more(self, place: int, adapter: Adapter) -> None:
        """See Shelf.place_more: the row of the delta for each token, counted from 1; 0 for tokens without."""
        self._ids[place] = adapter.tensors[IDS].detach().clone()
        n_places, vocabulary = self.tables[DELTA].dense.shape[0], int(self._table.weight.shape[0])  # type: ignore[index]
        device = anatomy.device_of(self.model)
        self._row_PV = torch.zeros(n_places, vocabulary, dtype=torch.int32, device=device)
        for other in self.places.values():
            ids = self._ids[other].to(device)
            self._row_PV[other, ids] = torch.arange(1, len(ids) + 1, dtype=torch.int32, device=device)

    def take(self, slot: int) -> None:
        """See Shelf.take."""
        place = self.places[slot]
        super().take(slot)
        del self._ids[place]
        self._row_PV[place] = 0

    def adapter(self, slot: int) -> Adapter:
        """See Shelf.adapter."""
        made = super().adapter(slot)
        return Adapter(made.kind, {IDS: self._ids[self.places[slot]].cpu(), **made.tensors}, made.config)

    def embedded(self, ids_BT: Tensor, output_BTH: Tensor) -> Tensor:
        """What the embedding gives with its adapters, where it gave this for these tokens without them."""
        if self.now is None or self.now.plan is None:
            return output_BTH
        plan, dense_PNH = self.now.plan, self.tables[DELTA].dense
        if ids_BT.dim() != 2 or ids_BT.shape[0] != plan.n_rows:
            raise AdapterError(
                f"input_ids are {tuple(ids_BT.shape)} where the batch has {plan.n_rows} rows. Pass rows by tokens."
            )
        place_B1 = plan.row_index_B(ids_BT.device).unsqueeze(1)
        row_BT = self._row_PV[place_B1, ids_BT].long()
        flat_BT = place_B1 * dense_PNH.shape[1] + (row_BT - 1).clamp(min=0)
        extra_BTH = functional.embedding(flat_BT, dense_PNH.flatten(0, 1)) * (row_BT > 0).unsqueeze(-1)
        return output_BTH + extra_BTH.to(output_BTH.dtype)

    def _on_output(self, module: nn.Module, inputs: tuple[Any, ...], output_BTH: Tensor) -> Tensor:
        del module
        return self.embedded(inputs[0], output_BTH)
