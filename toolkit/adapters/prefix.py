"""A prefix of learned keys and values before every row, in every layer, through PEFT (arXiv 2101.00190).

The model that `attach` and `load` return counts positions itself: toolkit/adapters/prompted.py says what callers pass.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolkit.adapters import anatomy, files, through_peft
from toolkit.adapters.contract import Kind, refuse_merge
from toolkit.errors import AdapterError

if TYPE_CHECKING:
    from toolkit.recipe.model import Prefix

ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


class PrefixKind(Kind["Prefix"]):
    """Kind `prefix`."""

    name = "prefix"
    stackable = True

    def attach(
        self,
        model: nn.Module,
        options: "Prefix",
        *,
        seed: int,
        token_ids: Sequence[int] | None = None,
        tokenizer: Any = None,
    ) -> nn.Module:
        """See Kind.attach. `tokenizer` is needed where options.init_text is given."""
        del token_ids
        through_peft.refuse_second(model)
        refuse_base(model, self.name)
        if options.init_text is not None and options.projection:
            raise AdapterError(
                "adapter.init_text: a prefix with projection cannot start from a text. Remove one of the two."
            )
        with through_peft.quiet():
            import peft

        start = None if options.init_text is None else _cache_of(model, options.init_text, options.tokens, tokenizer)
        config = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=options.tokens, prefix_projection=options.projection
        )
        wrapped = as_prompted(through_peft.attach(model, config, kind=self.name, seed=seed))
        if start is not None:
            if start.get_seq_length() < options.tokens or any(
                layer.keys.shape[-2] < options.tokens for layer in start.layers
            ):
                raise AdapterError(
                    f"adapter.tokens: this base keeps fewer than {options.tokens} tokens of a text in some layer. "
                    "Use fewer."
                )
            peft.initialize_kv_prefix_from_past_key_values(
                wrapped, past_key_values=start, num_virtual_tokens=options.tokens
            )
        return wrapped

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """See Kind.parameters: `prompt_embeddings`, what a projection gives for its tokens included."""
        return through_peft.parameters(model)

    def save(self, model: nn.Module, folder: Path, *, base: str = "", base_hash: str = "") -> None:
        """See Kind.save; plain PeftModel.from_pretrained opens the folder."""
        through_peft.save(model, folder, kind=self.name, origin=files.Origin(base, base_hash, anatomy.shape_of(model)))

    def load(self, model: nn.Module, folder: Path, *, base_hash: str = "") -> nn.Module:
        """See Kind.load."""
        return as_prompted(through_peft.load(model, folder, kind=self.name, base_hash=base_hash))

    def merge(self, model: nn.Module) -> nn.Module:
        """Always refused."""
        raise refuse_merge(self.name, "its keys and values stand before every row, and no weight of the base does that")

    def detach(self, model: nn.Module) -> nn.Module:
        """See Kind.detach."""
        return through_peft.detach(model, kind=self.name)


def as_prompted(wrapped: Any) -> nn.Module:
    """PEFT's model as the one that counts positions. PEFT picks the class of what it returns, so the class is set
    afterwards.
    """
    from toolkit.adapters.prompted import PromptedCausalLM

    wrapped.__class__ = PromptedCausalLM
    return wrapped  # type: ignore[no-any-return]


def refuse_base(model: nn.Module, kind: str) -> None:
    """AdapterError for a base whose layers hold no keys and values, or that is set to recompute them."""
    from toolkit.adapters.prompted import CHECKPOINTING

    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise AdapterError(CHECKPOINTING)
    others = set(getattr(anatomy.text_config(model), "layer_types", None) or ()) - ATTENTION
    if others:
        raise AdapterError(
            f"Kind {kind} needs attention in every layer, and this base also has {', '.join(sorted(others))}. Use "
            "kind lora."
        )


def _cache_of(model: nn.Module, text: str, n_tokens: int, tokenizer: Any) -> Any:
    """The base's own keys and values for the first `n_tokens` of a text, which is repeated where it is shorter."""
    if tokenizer is None:
        raise AdapterError(
            "adapter.init_text: starting from a text needs the base's tokenizer. Pass tokenizer to attach."
        )
    ids: list[int] = tokenizer(text, add_special_tokens=True)["input_ids"]
    if not ids:
        raise AdapterError("adapter.init_text: the text has no token. Write a sentence in the voice you want.")
    rows = torch.tensor([(ids * (n_tokens // len(ids) + 1))[:n_tokens]], device=anatomy.device_of(model))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        cache = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=True).past_key_values
    model.train(was_training)
    return cache
