"""One forward pass over rows in slots, in two ways: by the base's own modules, or by hand where the base is of a family
that serve/engines/lean.py knows.

Both are called inside `Stack.routed` and write into the slots' cache; they agree to 1e-5 (tests/same/test_lean.py).
"""

# R rows of a forward pass, A of them asked about, T new tokens (padded on the right), V vocabulary.

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from serve.cache import Frame, SlotCache
from toolkit.combine.gate import Reader
from toolkit.stack.stack import Stack

AUTO, MODULES, LEAN = "auto", "modules", "lean"
FORWARDS = (AUTO, MODULES, LEAN)
Masks = Tensor | Mapping[str, Tensor]  # for all layers, or by type of layer


class Forward(Protocol):
    """See the head of this file."""

    def __call__(
        self, ids_RT: Tensor, frame: Frame, masks: Masks, asked: Sequence[int], reader: Reader | None
    ) -> Tensor:
        """What follows the last real token of each row that is asked about, [A, V].

        asked: numbers of rows, in their order; a row whose prompt goes on is none. reader: of the gate that weighs
        adapters of these rows, inside its `with`.
        """


class ModulesForward:
    """Hugging Face's own modules, with what hangs on them: any causal language model."""

    def __init__(self, stack: Stack, cache: SlotCache) -> None:
        self._base, self._cache = stack.base, cache
        self._keeps = "logits_to_keep" in inspect.signature(stack.base.forward).parameters

    def __call__(
        self, ids_RT: Tensor, frame: Frame, masks: Masks, asked: Sequence[int], reader: Reader | None
    ) -> Tensor:
        """See Forward; the reader reads by hooks of its own."""
        del reader
        n_tokens, device = ids_RT.shape[1], ids_RT.device
        lasts = sorted({frame.counts[row] - 1 for row in asked}) or [n_tokens - 1]
        keep: dict[str, Any] = {}
        if self._keeps:
            keep["logits_to_keep"] = 1 if lasts == [n_tokens - 1] else torch.tensor(lasts, device=device)
        else:
            lasts = list(range(n_tokens))
        logits_RTV: Tensor = self._base(
            input_ids=ids_RT,
            attention_mask=masks,
            position_ids=frame.positions_RT,
            past_key_values=self._cache,
            use_cache=True,
            **keep,
        ).logits
        if len(lasts) == 1 and len(asked) == len(frame.counts):
            return logits_RTV[:, 0]
        places = torch.tensor([lasts.index(frame.counts[row] - 1) for row in asked], dtype=torch.long, device=device)
        return logits_RTV[torch.tensor(asked, dtype=torch.long, device=device), places]
