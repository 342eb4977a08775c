"""LoReFT in a stack: rotation, weight and bias of every adapter in three tables per edited layer.

The edit h + R^T (W h + b - R h) is one grouped matmul with W - R and one with R. A rotation that learns is made
orthonormal at every step, as toolkit/adapters/reft.py does; one that was saved is used bit for bit.
"""

# B rows, T tokens, G groups, N tokens in a group, K adapters, H hidden, R rank, P places.

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from toolkit.adapters import anatomy
from toolkit.adapters.reft import orthonormal
from toolkit.stack.adapter import Adapter
from toolkit.stack.grouped import Plan, as_read, dropped, in_groups, mixed_down, on_device, shares
from toolkit.stack.shelf import Now, Room, Shelf, refuse_misfit
from toolkit.stack.table import Table

SALT = 1 << 20  # tells the dropout of edits from that of linear layers


class ReftShelf(Shelf):
    """See the head of this file."""

    kind: ClassVar[str] = "reft"
    can_mix: ClassVar[bool] = True

    def __init__(self, model: Any, dtype: torch.dtype, room: Room) -> None:
        super().__init__(model, torch.promote_types(dtype, torch.float32), room)  # less is too little for the edit
        self._handles: dict[int, RemovableHandle] = {}
        self._raw: dict[int, int] = {}  # the rank of each place whose rotation is made orthonormal
        self._dropout: dict[int, float] = {}
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}  # of the places here now

    def check(self, adapter: Adapter) -> None:
        """See Shelf.check."""
        hidden, n_layers = anatomy.hidden_size(self.model), len(anatomy.decoder_layers(self.model))
        rank = int(adapter.config.get("rank", 0))
        shapes = {"rotation": (rank, hidden), "weight": (rank, hidden), "bias": (rank,)}
        wrong, numbers = [], set()
        for name, tensor in adapter.tensors.items():
            parts = name.split(".")
            if len(parts) != 3 or parts[0] != "layers" or parts[2] not in shapes or not parts[1].isdigit():
                wrong.append(f"{name} has no place")
            elif int(parts[1]) >= n_layers:
                wrong.append(f"{name} has no layer among {n_layers}")
            elif tuple(tensor.shape) != shapes[parts[2]]:
                wrong.append(f"{name} is {tuple(tensor.shape)} where {shapes[parts[2]]} fits")
            else:
                numbers.add(int(parts[1]))
        every = {f"layers.{number}.{part}" for number in numbers for part in shapes}
        wrong += [f"{name} is missing" for name in sorted(every - adapter.tensors.keys())]
        refuse_misfit(self.kind, wrong if adapter.tensors else ["it holds no tensor"])

    def layout(self, adapter: Adapter) -> dict[str, str]:
        """See Shelf.layout."""
        return {name: name for name in adapter.tensors}

    def make_table(self, key: str) -> Table:
        """See Shelf.make_table."""
        number = int(key.split(".")[1])
        layer = anatomy.decoder_layers(self.model)[number]
        if number not in self._handles:
            self._handles[number] = layer.register_forward_hook(self._hook(number))
        return Table(next(layer.parameters()).device, self.dtype)

    def drop_table(self, key: str) -> None:
        """See Shelf.drop_table."""
        handle = self._handles.pop(int(key.split(".")[1]), None)
        if handle is not None:
            handle.remove()

    def put(self, slot: int, adapter: Adapter, *, learns: bool) -> None:
        """See Shelf.put."""
        super().put(slot, adapter, learns=learns)
        self._indices.clear()
        if learns or adapter.is_raw:
            self._raw[self.places[slot]] = int(adapter.config["rank"])

    def take(self, slot: int) -> None:
        """See Shelf.take."""
        self._raw.pop(self.places[slot], None)
        self._indices.clear()
        super().take(slot)

    def place_more(self, place: int, adapter: Adapter) -> None:
        """See Shelf.place_more."""
        self._dropout[place] = float(adapter.config.get("dropout") or 0.0)

    def adapter(self, slot: int) -> Adapter:
        """See Shelf.adapter: the rotations as they are used."""
        made = super().adapter(slot)
        if self.places[slot] not in self._raw:
            return made
        used = {
            name: orthonormal(tensor).contiguous() if name.endswith(".rotation") else tensor
            for name, tensor in made.tensors.items()
        }
        return Adapter(made.kind, used, made.config)

    def edited(self, number: int, hidden: Tensor) -> Tensor:
        """What a decoder layer gives with its adapters, where it gave this without them."""
        return hidden if self.now is None or number not in self._handles else self._edited(number, self.now, hidden)

    def _hook(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def on_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            del module, inputs
            if isinstance(output, tuple):
                return (self.edited(number, output[0]), *output[1:])
            return self.edited(number, output)

        return on_output

    def _edited(self, number: int, now: Now, hidden: Tensor) -> Tensor:
        edited = hidden
        if now.plan is not None:
            a_GRH, bias_G1R, rotation_GRH = self._weights(number, now.plan)
            hidden_GNH = as_read(in_groups(hidden, now.plan, f"decoder layer {number}"), self.dtype)
            moved_GNR = torch.baddbmm(bias_G1R, hidden_GNH, a_GRH.mT)
            edit_GNH = torch.bmm(moved_GNR, rotation_GRH)
            share_B = None if now.draw_B is None else shares(now.plan, self._dropout, hidden.device)
            if now.draw_B is not None and share_B is not None:
                edit_GNH = dropped(edit_GNH, now.plan, share_B, now.draw_B, SALT + number)
            edited = edited + edit_GNH.view(hidden.shape).to(hidden.dtype)
        if now.mix is not None:
            weights_BTK = now.mix.weights(number).to(hidden.device, self.dtype)
            a_PRH, bias_PR, rotation_PRH = self._parts(number)
            rotation_KRH = now.mix.select(rotation_PRH)
            u_BTKR = mixed_down(hidden.to(self.dtype), now.mix.select(a_PRH), weights_BTK, now.mix.select(bias_PR))
            edit_BTH = (u_BTKR.flatten(0, 1).flatten(1) @ rotation_KRH.flatten(0, 1)).view(hidden.shape)
            edited = edited + edit_BTH.to(hidden.dtype)
        return edited

    def _weights(self, number: int, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        def gathered() -> tuple[Tensor, Tensor, Tensor]:
            a_PRH, bias_PR, rotation_PRH = self._parts(number)
            return plan.select(a_PRH), plan.select(bias_PR).unsqueeze(1), plan.select(rotation_PRH)

        if self.learns:
            return gathered()
        found: tuple[Tensor, Tensor, Tensor] = plan.memo(("edit", number), gathered)
        return found

    def _index(self, places: tuple[int, ...], device: torch.device) -> Tensor:
        if (places, device) not in self._indices:
            with torch.inference_mode(False):  # backward may need it later
                self._indices[places, device] = on_device(places, device)
        return self._indices[places, device]

    def _parts(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """W - R, b and R of every place."""
        key = f"layers.{number}."
        rotation_PRH, weight_PRH = self.tables[f"{key}rotation"].dense, self.tables[f"{key}weight"].dense
        sized = self.tables[f"{key}rotation"].sizes()
        for rank in sorted({rank for place, rank in self._raw.items() if place in sized}):
            places = tuple(place for place, own in self._raw.items() if own == rank and place in sized)
            index = self._index(places, rotation_PRH.device)
            made = orthonormal(self.tables[f"{key}rotation"].dense.index_select(0, index)[:, :rank])
            padded = nn.functional.pad(made, (0, 0, 0, rotation_PRH.shape[1] - rank)).to(self.dtype)
            rotation_PRH = rotation_PRH.index_copy(0, index, padded)
        return weight_PRH - rotation_PRH, self.tables[f"{key}bias"].dense, rotation_PRH
