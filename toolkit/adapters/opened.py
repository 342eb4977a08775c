"""A causal language model opened for measuring and generating, whatever adapter it wears; no gradients come out of this
room.

Callers see tokens alone. A prefix or a virtual prompt (PEFT's prompt learning kinds) is put into the cache before the
first token, and its columns of the attention mask and its share of the positions are added here: PeftModel.forward
would put it in again at every step, and a left-padded prefix without explicit positions is silently wrong. Every other
adapter acts inside the model and needs nothing.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from toolkit.adapters import anatomy
from toolkit.errors import AdapterError

# B rows, T new tokens, S tokens so far (cached and new, without a prefix), P prefix, N kept positions, H hidden, V
# vocabulary.


@dataclass(frozen=True)
class Opened:
    """A model and what has to lie in its cache before the first token; `n_prefix` cache columns come before it in every
    row.
    """

    model: Any
    wearer: Any
    n_prefix: int
    context: int | None
    takes: frozenset[str]

    @property
    def needs_equal_lengths(self) -> bool:
        """Whether padding between a prefix and the tokens would push the prefix out of a sliding window."""
        return self.n_prefix > 0 and anatomy.sliding_window(self.model) is not None

    @property
    def n_members(self) -> int:
        """How many rows a forward pass computes for each row it is given: more than one where several answer as one."""
        return 1

    @property
    def takes_any_row(self) -> bool:
        """Whether every row is answered alike, wherever it stands in a batch and however many there are."""
        return True

    @property
    def device(self) -> torch.device:
        """Where token ids have to lie."""
        return anatomy.device_of(self.model)

    @property
    def n_vocabulary(self) -> int:
        """The width of the logits: the vocabulary of the config, which may be padded beyond the tokenizer's."""
        return int(anatomy.text_config(self.model).vocab_size)

    def start(self, n_rows: int) -> DynamicCache:
        """A fresh cache of `n_rows` rows that holds the prefix, or nothing."""
        if self.n_prefix == 0:
            return DynamicCache(config=self.model.config)
        with torch.no_grad():
            before = self.wearer.get_prompt(batch_size=n_rows)
            if not isinstance(before, Tensor):
                return before  # type: ignore[no-any-return]
            cache = DynamicCache(config=self.model.config)
            embeddings = before.to(self.model.get_input_embeddings().weight.dtype)
            positions = torch.arange(self.n_prefix, device=before.device).expand(n_rows, -1)
            at = {"position_ids": positions} if "position_ids" in self.takes else {}
            self.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, **at)
            return cache

    def logits(
        self, ids_BT: Tensor, mask_BS: Tensor, cache: DynamicCache | None, keep_BT: Tensor | None = None
    ) -> Tensor:
        """What follows the kept positions, [N, V] in row order; without `keep_BT`, what follows each row's last token,
        [B, V].

        `mask_BS` is 1 where a token is real, over the cached and the new tokens; padding may stand on either side. The
        cache grows by T columns; without one the whole row is in `ids_BT`. Only kept positions go through the head.
        """
        past = cache if cache is not None or self.n_prefix == 0 else self.start(len(ids_BT))
        options: dict[str, Any] = {"past_key_values": past, "use_cache": past is not None}
        if "position_ids" in self.takes:
            options["position_ids"] = (mask_BS.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :] + self.n_prefix
        if keep_BT is None and "logits_to_keep" in self.takes:
            options["logits_to_keep"] = 1
        elif keep_BT is not None and self._keeps_by_mask:
            options["logits_to_keep"] = keep_BT.bool()
        mask = torch.cat([mask_BS.new_ones(len(mask_BS), self.n_prefix), mask_BS], dim=1)
        called = self.model if self.n_prefix else self.wearer
        with torch.no_grad():
            logits: Tensor = called(input_ids=ids_BT, attention_mask=mask, **options).logits
        if keep_BT is None:
            return logits[:, -1]
        return logits if logits.dim() == 2 else logits[keep_BT.bool()]

    @property
    def _keeps_by_mask(self) -> bool:
        return hasattr(sys.modules[type(self.model).__module__], "slice_logits_to_keep")


def open_model(model: nn.Module) -> Opened:
    """Open a Hugging Face causal language model, a PeftModel around one, or one with forward hooks.

    Raises: AdapterError for PEFT's prompt learning kinds that need a task with every row.
    """
    worn: Any = getattr(model, "active_peft_config", None)
    disabled = bool(getattr(model, "_adapters_disabled", False))
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    n_prefix = worn.num_virtual_tokens if worn is not None and worn.is_prompt_learning and not disabled else 0
    if n_prefix and "MULTITASK" in str(worn.peft_type):
        raise AdapterError(
            f"{worn.peft_type}: needs a task id with every row, which no recipe gives. Use another kind."
        )
    context = getattr(anatomy.text_config(inner), "max_position_embeddings", None)
    return Opened(
        model=inner,
        wearer=model,
        n_prefix=int(n_prefix),
        context=None if context is None else int(context) - int(n_prefix),
        takes=frozenset(inspect.signature(inner.forward).parameters),
    )


@contextmanager
def measuring(model: nn.Module | Opened) -> Iterator[Opened]:
    """Open a model with dropout off; it trains on afterwards if it trained before.

    One that its caller opened (several adapters that answer as one) stays the caller's, as it is.
    """
    if isinstance(model, Opened):
        yield model
        return
    trained = model.training
    model.eval()
    try:
        yield open_model(model)
    finally:
        model.train(trained)
