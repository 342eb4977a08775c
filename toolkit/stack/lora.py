"""LoRA in a stack: A and B of every adapter in two tables per linear layer, padded to the largest rank."""

# G groups of rows, N tokens in a group, K adapters, I/O features in/out, R rank, P places.

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from toolkit.adapters import anatomy
from toolkit.errors import AloneError
from toolkit.stack.adapter import ALONE, Adapter
from toolkit.stack.beside import Beside
from toolkit.stack.grouped import Mix, Plan, add_grouped, add_mixed, as_read, dropped, in_groups, on_device, shares
from toolkit.stack.shelf import Now, Room, Shelf, holding_layer, in_expert_list, layer_numbers, refuse_misfit
from toolkit.stack.table import Table

N_KEPT = 8  # batches: as many as a stack remembers plans of
PREFIX = "base_model.model."  # what PEFT writes before every name of the base
PART = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])\.weight$")


@dataclass
class Pair:
    """One linear layer: its tables, the scale of each place, its number among the decoder layers, its hook."""

    name: str
    number: int
    layer: int | None
    a_PRI: Table
    b_PRO: Table
    scales: dict[int, float] = field(default_factory=dict)
    handle: RemovableHandle | None = None


class LoraShelf(Shelf):
    """See the head of this file."""

    kind: ClassVar[str] = "lora"
    can_mix: ClassVar[bool] = True

    def __init__(self, model: Any, dtype: torch.dtype, room: Room) -> None:
        super().__init__(model, dtype, room)
        self._linear = anatomy.linear_layers(model)
        self._numbers = {name: number for number, name in enumerate(self._linear)}
        self._layers = layer_numbers(model)
        self._experts = {name for name in self._linear if in_expert_list(self._layers, name)}
        self._pairs: dict[str, Pair] = {}
        self._dropout: dict[int, float] = {}
        self._besides: OrderedDict[tuple[int, ...], dict[tuple[str, ...], tuple[Beside, int]]] = OrderedDict()

    def check(self, adapter: Adapter) -> None:
        """See Shelf.check; a layer that is no linear layer, or an expert's, is refused by name."""
        wrong, odd, parts = [], [], _parts(adapter)
        for name in adapter.tensors:
            found = PART.match(name.removeprefix(PREFIX))
            module = found["module"] if found else name
            if found is None or module not in self._linear or module in self._experts:
                odd.append(module)
        if odd:
            raise AloneError(
                f"no stack can hold this lora adapter: {', '.join(sorted(set(odd))[:4])} "
                f"{'is' if len(set(odd)) == 1 else 'are'} no linear layer that sees whole rows (nn.Linear, Conv1D or "
                f"their 4- and 8-bit forms; not the head, not experts). {ALONE}"
            )
        for module, pair in parts.items():
            n_in, n_out = _features(self._linear[module])
            if set(pair) != {"A", "B"}:
                wrong.append(f"{module} has only lora_{next(iter(pair))}")
            elif pair["A"].shape[1:] != (n_in,) or pair["B"].shape != (n_out, pair["A"].shape[0]):
                shapes = f"{tuple(pair['A'].shape)} and {tuple(pair['B'].shape)}"
                wrong.append(f"{module} takes (rank, {n_in}) and ({n_out}, rank), not {shapes}")
        refuse_misfit(self.kind, wrong if parts else ["it holds no tensor"])

    def layout(self, adapter: Adapter) -> dict[str, str]:
        """See Shelf.layout."""
        return {name: name.removeprefix(PREFIX).removesuffix(".weight") for name in adapter.tensors}

    def make_table(self, key: str) -> Table:
        """See Shelf.make_table; the two tables of a layer are made together, with one hook."""
        module, part = key.rsplit(".lora_", 1)
        if module not in self._pairs:
            linear = self._linear[module]
            device = next(linear.parameters()).device
            layer = self._layers.get(holding_layer(self._layers, module) or "")
            pair = Pair(
                name=module,
                number=self._numbers[module],
                layer=layer,
                a_PRI=Table(device, self.dtype),
                b_PRO=Table(device, self.dtype, is_transposed=True),
            )
            pair.handle = linear.register_forward_hook(self._hook(pair))
            self._pairs[module] = pair
        return self._pairs[module].a_PRI if part == "A" else self._pairs[module].b_PRO

    def drop_table(self, key: str) -> None:
        """See Shelf.drop_table."""
        pair = self._pairs.pop(key.rsplit(".lora_", 1)[0], None)
        if pair is not None and pair.handle is not None:
            pair.handle.remove()

    def place_more(self, place: int, adapter: Adapter) -> None:
        """See Shelf.place_more: the scale of each layer, and dropout."""
        for module, pair in _parts(adapter).items():
            self._pairs[module].scales[place] = scale_of(adapter.config, module, pair["A"].shape[0])
        self._dropout[place] = float(adapter.config.get("lora_dropout") or 0.0)

    def update(self, module: str, x: Tensor, y: Tensor) -> Tensor:
        """What the layer named gives with its adapters, where it gave `y` for `x` without them."""
        pair = self._pairs.get(module)
        return y if pair is None or self.now is None else self._added(pair, self.now, x, y)

    def update_parts(self, modules: Sequence[str], x: Tensor, y: Tensor, widths: Sequence[int]) -> None:
        """The same for layers that read the same x and wrote their outputs beside each other into y, which is changed.

        Costs one matmul down for all of them, and one up for each, or for all where each group is one token.
        """
        now = self.now
        if now is None:
            return
        named = zip(modules, torch.split(y, list(widths), dim=-1), strict=True)
        own = [(pair, part) for module, part in named if (pair := self._pairs.get(module)) is not None]
        is_plain = now.mix is None and now.draw_B is None and not self.learns and x.dtype == y.dtype == self.dtype
        if is_plain and now.plan is not None and own and not torch.is_grad_enabled():
            rank = max(pair.a_PRI.dense.shape[1] for pair, _ in own)
            together = now.plan.gathered(x, rank)
            beside = self._beside([pair for pair, _ in own], now.plan if together is None else together.plan)
            if beside is not None:
                beside.add([part for _, part in own], x, together, y if len(own) == len(modules) else None)
                return
        for pair, part in own:
            made = self._added(pair, now, x, part)
            if made is not part:
                part.copy_(made)

    def _hook(self, pair: Pair) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def on_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            del module
            return None if self.now is None else self._added(pair, self.now, inputs[0], output)

        return on_output

    def _added(self, pair: Pair, now: Now, x: Tensor, y: Tensor) -> Tensor:
        plan = now.plan
        together = None if plan is None or now.draw_B is not None else plan.gathered(x, pair.a_PRI.dense.shape[1])
        if together is not None:
            a_GRI, b_GRO, scale_G11 = self._weights(pair, together.plan)
            x_GNI = as_read(in_groups(x.index_select(0, together.rows), together.plan, pair.name), a_GRI.dtype)
            y = add_grouped(y.index_select(0, together.rows), x_GNI, a_GRI, b_GRO, scale_G11)
            y = y.index_select(0, together.back_B)
        elif plan is not None:
            a_GRI, b_GRO, scale_G11 = self._weights(pair, plan)
            x_GNI = in_groups(x, plan, pair.name)
            share_B = None if now.draw_B is None else shares(plan, self._dropout, x.device)
            if now.draw_B is None or share_B is None:
                x_GNI = as_read(x_GNI, a_GRI.dtype)
            else:
                x_GNI = dropped(x_GNI.to(a_GRI.dtype), plan, share_B, now.draw_B, pair.number)
            y = add_grouped(y, x_GNI, a_GRI, b_GRO, scale_G11)
        return y if now.mix is None else self._mixed(pair, now.mix, x, y)

    def _mixed(self, pair: Pair, mix: Mix, x: Tensor, y: Tensor) -> Tensor:
        weights_BTK = mix.weights(pair.layer)
        scales = tuple(pair.scales.get(place, 0.0) for place in mix.places)
        scale_K = mix.numbers(scales, x.device, torch.float32)
        weights_BTK = (weights_BTK.to(x.device) * scale_K).to(self.dtype)
        return add_mixed(y, x, mix.select(pair.a_PRI.dense), mix.select(pair.b_PRO.dense), weights_BTK)

    def _weights(self, pair: Pair, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and scale for each group; while nothing learns, gathered once, the scale inside B."""
        found: tuple[Tensor, Tensor, Tensor | None] | None = plan.kept.get(pair.name)
        if found is not None:
            return found
        a_GRI, b_GRO = plan.select(pair.a_PRI.dense), plan.select(pair.b_PRO.dense)
        scale_G11: Tensor = plan.memo(
            ("scale", tuple(pair.scales.items()), a_GRI.device),
            lambda: on_device([pair.scales.get(place, 0.0) for place in plan.places], a_GRI.device, self.dtype).view(
                -1, 1, 1
            ),
        )
        n_bytes = (a_GRI.numel() + b_GRO.numel()) * a_GRI.element_size()
        if self.learns or n_bytes > self.room.n_bytes:
            return a_GRI, b_GRO, scale_G11
        self.room.n_bytes -= n_bytes
        plan.n_kept_bytes += n_bytes
        plan.kept[pair.name] = (a_GRI, b_GRO * scale_G11, None)
        return a_GRI, b_GRO * scale_G11, None

    def forget(self) -> None:
        """Let go of what was gathered: an adapter came or went."""
        while self._besides:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, layers = self._besides.popitem(last=False)
        self.room.n_bytes += sum(n_bytes for _, n_bytes in layers.values())

    def _beside(self, pairs: Sequence[Pair], plan: Plan) -> Beside | None:
        """A and B of several layers for each group, gathered once for all batches with these groups, whatever their
        rows; None where there is no room to keep them. The groups of N_KEPT batches are kept, and make room for others.
        """
        layers = self._besides.setdefault(plan.places, {})
        self._besides.move_to_end(plan.places)
        names = tuple(pair.name for pair in pairs)
        if names in layers:
            return layers[names][0]
        n_numbers = sum(math.prod(pair.a_PRI.dense.shape[1:]) + math.prod(pair.b_PRO.dense.shape[1:]) for pair in pairs)
        n_bytes = len(plan.places) * n_numbers * self.dtype.itemsize
        while len(self._besides) > 1 and (len(self._besides) > N_KEPT or n_bytes > self.room.n_bytes):
            self._forget_oldest()
        if n_bytes > self.room.n_bytes:
            return None
        gathered = [self._scaled(pair, plan) for pair in pairs]
        made = Beside.of([a_GRI for a_GRI, _ in gathered], [b_GRO for _, b_GRO in gathered])
        self.room.n_bytes -= n_bytes
        layers[names] = made, n_bytes
        return made

    def _scaled(self, pair: Pair, plan: Plan) -> tuple[Tensor, Tensor]:
        a_GRI, b_GRO = plan.select(pair.a_PRI.dense), plan.select(pair.b_PRO.dense)
        scales = [pair.scales.get(place, 0.0) for place in plan.places]
        return a_GRI, b_GRO * on_device(scales, a_GRI.device, self.dtype).view(-1, 1, 1)


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """By how much B A is multiplied in one layer: alpha / rank, or alpha / sqrt(rank) when rank-stabilised."""
    patterns = config.get("alpha_pattern") or {}
    named = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(config["lora_alpha"] if named is None else patterns[named])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _parts(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        found = PART.match(name.removeprefix(PREFIX))
        if found is not None:
            parts.setdefault(found["module"], {})[found["part"]] = tensor
    return parts


def _features(linear: Any) -> tuple[int, int]:
    """Features in and out, as nn.Linear has them; Conv1D keeps its weight as (in, out)."""
    if hasattr(linear, "in_features"):
        return int(linear.in_features), int(linear.out_features)
    n_in, n_out = linear.weight.shape
    return int(n_in), int(n_out)
