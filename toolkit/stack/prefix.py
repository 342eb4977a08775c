"""Prefixes in a stack: the learned keys and values of every adapter in one table, put into the cache row by row.

A prefix stands directly before the row's tokens: in a batch where the widest prefix has N columns, a row with n < N has
N - n masked columns first, and a row without prefix N of them. Positions count a row's own n, so that every row sees
what it would see alone.
"""

# B rows, T tokens, N prefix columns, C numbers per token (layers, keys and values, heads), P places.

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from toolkit.adapters import anatomy
from toolkit.adapters.prefix import refuse_base
from toolkit.errors import AloneError
from toolkit.stack.adapter import ALONE, Adapter
from toolkit.stack.grouped import Plan, on_device
from toolkit.stack.shelf import Shelf, refuse_misfit
from toolkit.stack.table import Table

NAME = "prompt_embeddings"
OTHER_CACHES = ("bloom", "gpt_bigcode", "gemma4", "gemma4_text")  # PEFT lays a prefix out differently for these


class PrefixShelf(Shelf):
    """See the head of this file."""

    kind: ClassVar[str] = "prefix"

    def check(self, adapter: Adapter) -> None:
        """See Shelf.check."""
        config = anatomy.text_config(self.model)
        refuse_base(self.model, self.kind)
        if config.model_type in OTHER_CACHES or getattr(config, "num_kv_shared_layers", None):
            raise AloneError(f"no stack can hold a prefix on a {config.model_type}: its layers share caches. {ALONE}")
        width = 2 * config.num_hidden_layers * anatomy.key_value_width(self.model)
        found = adapter.tensors.get(NAME)
        wrong = sorted(adapter.tensors.keys() ^ {NAME})
        if found is not None and (found.dim() != 2 or found.shape[1] != width or not len(found)):
            wrong.append(f"{NAME} is {tuple(found.shape)} where (tokens, {width}) fits")
        refuse_misfit(self.kind, wrong)

    def layout(self, adapter: Adapter) -> dict[str, str]:
        """See Shelf.layout."""
        del adapter
        return {NAME: NAME}

    def make_table(self, key: str) -> Table:
        """See Shelf.make_table; nothing hangs on the base."""
        del key
        return Table(anatomy.device_of(self.model), self.dtype, at_end=True)

    def widths(self, plan: Plan | None, n_rows: int) -> list[int]:
        """How many columns each row's own prefix has."""
        if plan is None:
            return [0] * n_rows
        sizes = self.tables[NAME].sizes()
        return [sizes[place][0] if place else 0 for place in plan.places for _ in range(plan.group_size)]

    def width_B(self, plan: Plan, device: torch.device) -> Tensor:
        """The same as a tensor, made once for these rows."""
        made: Tensor = plan.memo(("widths", device), lambda: on_device(self.widths(plan, plan.n_rows), device))
        return made

    def fill(self, cache: Any, plan: Plan, widest: int) -> None:
        """Put each row's prefix, zeros where it has none, into an empty cache."""
        dense_PNC = self.tables[NAME].dense
        rows_BNC = dense_PNC.index_select(0, plan.row_index_B(dense_PNC.device))[:, dense_PNC.shape[1] - widest :]
        for index, (keys, values) in enumerate(self._layers(rows_BNC)):
            cache.update(keys, values, index)

    def keys_and_values(self, slot: int) -> list[tuple[Tensor, Tensor]]:
        """One adapter's keys and values per layer, each [heads, n, width of a head], in the base's type."""
        value_NC = self.tables[NAME].value(self.places[slot])
        return [(keys[0], values[0]) for keys, values in self._layers(value_NC.unsqueeze(0))]

    def _layers(self, rows_BNC: Tensor) -> list[tuple[Tensor, Tensor]]:
        config = anatomy.text_config(self.model)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        n_rows, n_columns, _ = rows_BNC.shape
        dtype = anatomy.input_embeddings(self.model).weight.dtype
        split = rows_BNC.to(dtype).view(n_rows, n_columns, 2 * config.num_hidden_layers, heads, -1)  # type: ignore[arg-type]
        by_layer = split.permute(2, 0, 3, 1, 4)
        return [(by_layer[2 * index], by_layer[2 * index + 1]) for index in range(config.num_hidden_layers)]

    def new_cache(self) -> DynamicCache:
        """An empty cache of this base."""
        return DynamicCache(config=self.model.config)


def widened_mask(mask_BS: Tensor, width_B: Tensor, widest: int) -> Tensor:
    """The mask with `widest` columns before it, of which each row sees its own last ones."""
    column_N = torch.arange(widest, device=mask_BS.device)
    first_B1 = (widest - width_B).unsqueeze(1)
    return torch.cat([(column_N >= first_B1).to(mask_BS.dtype), mask_BS], dim=1)
