"""The language-model head sees the positions whose next token is supervised, and no others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

MAX_LOGITS = 2**26  # elements of [supervised tokens, vocabulary] that are computed in one block


class SupervisedHead:
    """Put on a head once; `remove` takes it off."""

    def __init__(self, head: nn.Module) -> None:
        self._keep: torch.Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._select)

    def remove(self) -> None:
        """The head is as it was."""
        self._hook.remove()

    @contextmanager
    def only(self, keep_BT: torch.Tensor) -> Iterator[None]:
        """Within, the head's input [B, T, H] becomes [N, H]: the N positions that `keep_BT` marks."""
        self._keep = keep_BT
        try:
            yield
        finally:
            self._keep = None

    def _select(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._keep is None:
            return None
        hidden_BTH = inputs[0][:, -self._keep.shape[1] :]  # virtual tokens of prompt tuning stand before the row
        return (hidden_BTH[self._keep], *inputs[1:])
