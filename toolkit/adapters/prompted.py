"""PEFT's model for kinds that put learned positions before a row (prefix, prompt, p-tuning), called like any causal LM.

PEFT's own forward is silently wrong where these rows are padded on the left, packed, or continued from a cache. This
one counts positions for the caller, hands its own cache on, and refuses what cannot be right. Callers pass what they
would pass to the base alone:
- `attention_mask` over the row's own tokens (padding 0, on either side), all of them, cached ones too;
- `position_ids`, if at all, counted from the row's first real token, without the learned positions;
- `past_key_values` as this model returned it, or an empty cache to be filled: it holds the learned positions as well.
The logits returned are those of the row's own tokens. Importing this module imports PEFT: import it inside functions.
"""

# B rows, T tokens of this call, C tokens in the cache (learned ones included), N learned positions.

import warnings
from typing import Any

import torch
from peft import PeftModelForCausalLM, PeftType
from torch import Tensor

from toolkit.adapters import anatomy
from toolkit.errors import AdapterError

CHECKPOINTING = (
    "An adapter that puts learned positions before the row cannot use activation checkpointing, which drops the "
    "cache they lie in. "
    "Set train.activation_checkpointing to false, or use kind lora."
)


class PromptedCausalLM(PeftModelForCausalLM):  # type: ignore[misc]
    """See the head of this file."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The base's output with the learned positions before every row.

        Raises: AdapterError for packed rows, for activation checkpointing, and for left padding on a base with a
        sliding window.
        """
        if input_ids is None:
            raise AdapterError(
                "This adapter needs input_ids: embeddings given instead have no place for what it learned."
            )
        n_learned = self.active_peft_config.num_virtual_tokens
        n_cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        mask_BX = _whole_mask(attention_mask, input_ids, n_cached, n_learned)
        positions_BT = _positions(position_ids, mask_BX, input_ids, n_learned)
        self._refuse_what_is_wrong(mask_BX, positions_BT, n_learned)
        given = {**others, "attention_mask": mask_BX, "labels": labels}
        if n_cached:
            return self.base_model(
                input_ids=input_ids, position_ids=positions_BT, past_key_values=past_key_values, **given
            )
        if self.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
            cache = self._filled(past_key_values, len(input_ids))
            return self.base_model(input_ids=input_ids, position_ids=positions_BT, past_key_values=cache, **given)
        given["past_key_values"] = past_key_values
        return self._with_embeddings(input_ids, positions_BT, n_learned, given)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """What PEFT prepares for `generate`, with the positions of prompt tuning counted and left padding checked."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")  # they are, below
            prepared = super().prepare_inputs_for_generation(*args, **kwargs)
        mask_BX = prepared.get("attention_mask")
        if not isinstance(mask_BX, Tensor) or mask_BX.dim() != 2:
            return prepared
        fed = prepared.get("inputs_embeds") if prepared.get("input_ids") is None else prepared["input_ids"]
        positions_BT = (mask_BX.cumsum(-1) - 1).clamp(min=0)[:, -fed.shape[1] :].long()
        self._refuse_what_is_wrong(mask_BX, positions_BT, self.active_peft_config.num_virtual_tokens)
        prepared["position_ids"] = positions_BT
        return prepared

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Always refused."""
        del args, kwargs
        raise AdapterError(CHECKPOINTING)

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.23

    def _filled(self, cache: Any, n_rows: int) -> Any:
        """The caller's empty cache with the prefix in it, or a new one."""
        prefix = self.get_prompt(n_rows)
        if cache is None:
            return prefix
        for index, layer in enumerate(prefix.layers):
            if layer.keys is not None:
                cache.update(layer.keys, layer.values, index)
        return cache

    def _with_embeddings(self, input_ids: Tensor, positions_BT: Tensor, n_learned: int, given: dict[str, Any]) -> Any:
        """The first pass of prompt tuning: learned embeddings before those of the tokens; their logits are cut off
        again.
        """
        embeddings = self.word_embeddings(input_ids)
        learned = self.get_prompt(batch_size=len(input_ids)).to(embeddings.dtype)
        first_BN = torch.arange(n_learned, device=positions_BT.device).expand(len(input_ids), n_learned)
        if given["labels"] is not None:
            given["labels"] = torch.cat([torch.full_like(first_BN, -100), given["labels"]], dim=1)
        output = self.base_model(
            inputs_embeds=torch.cat([learned, embeddings], dim=1),
            position_ids=torch.cat([first_BN, positions_BT], dim=1),
            **given,
        )
        logits = getattr(output, "logits", None)
        if logits is not None and logits.shape[1] == n_learned + input_ids.shape[1]:
            output.logits = logits[:, n_learned:]
        return output

    def _refuse_what_is_wrong(self, mask_BX: Tensor, positions_BT: Tensor, n_learned: int) -> None:
        if self.training and any(
            getattr(module, "gradient_checkpointing", False) for module in self.base_model.modules()
        ):
            raise AdapterError(CHECKPOINTING)
        real_BT = mask_BX[:, -positions_BT.shape[1] :].bool()
        both_BT = real_BT[:, 1:] & real_BT[:, :-1]
        if bool(((positions_BT[:, 1:] <= positions_BT[:, :-1]) & both_BT).any()):
            raise AdapterError(
                "An adapter that puts learned positions before the row cannot learn from packed rows: only the first "
                "of them would see "
                "what it learned. Set train.packing to false, or use kind lora."
            )
        window = anatomy.sliding_window(self.base_model)
        if window and mask_BX.shape[1] > window and not bool(mask_BX[:, n_learned].all()):
            raise AdapterError(
                f"On a base with a sliding window of {window}, rows with learned positions cannot be padded on the "
                "left to "
                f"{mask_BX.shape[1]}: padding would push what was learned out of the window. Send rows of one "
                "length, or pad on the right."
            )


def _whole_mask(attention_mask: Tensor | None, input_ids: Tensor, n_cached: int, n_learned: int) -> Tensor:
    """The mask over learned, cached and new tokens. One that already covers the learned ones is taken as it is.

    Raises: AdapterError when the mask given covers neither.
    """
    n_rows, n_new = input_ids.shape
    whole = max(n_cached, n_learned) + n_new
    if attention_mask is None:
        return torch.ones(n_rows, whole, dtype=torch.long, device=input_ids.device)
    if attention_mask.shape == (n_rows, whole):
        return attention_mask
    if attention_mask.shape != (n_rows, whole - n_learned):
        raise AdapterError(
            f"The attention mask is {tuple(attention_mask.shape)}; {n_rows} rows with {whole - n_learned} tokens, "
            "cached ones "
            "included, need one number for each."
        )
    ones = torch.ones(n_rows, n_learned, dtype=attention_mask.dtype, device=attention_mask.device)
    return torch.cat([ones, attention_mask], dim=1)


def _positions(position_ids: Tensor | None, mask_BX: Tensor, input_ids: Tensor, n_learned: int) -> Tensor:
    """Positions of the new tokens, the learned ones counted: from the mask, or from the caller's, which leave those
    out.
    """
    if position_ids is not None:
        return position_ids.expand(input_ids.shape) + n_learned
    return (mask_BX.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :].long()
