"""Where the parts of a causal language model lie, found by their structure rather than by the model's name.

Hugging Face models call the same parts differently (model.layers, transformer.h, gpt_neox.layers): nothing here knows a
model type. Nothing here loads weights or changes a model, except `without_quantisation`, which says so.
"""

from typing import Any

import torch
from torch import nn

from toolkit.errors import AdapterError


def text_config(model: Any) -> Any:
    """The config of the language part: of the model itself, or of its text half where it also sees or hears."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise AdapterError(f"{type(model).__name__} has no config: adapters need a Hugging Face causal language model.")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers in order.

    Raises: AdapterError when no list of modules has as many entries as the config says layers, or when several do.
    """
    count = text_config(model).num_hidden_layers
    start = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = {
        name: module
        for name, module in start.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise AdapterError(
            f"{type(model).__name__}: cannot tell which modules are its {count} decoder layers "
            f"({', '.join(outermost) if outermost else 'none fit'}). Use kind lora, which needs no layers by number."
        )
    return found[outermost[0]]


def input_embeddings(model: Any) -> nn.Module:
    """The module that turns token ids into vectors, with its `weight` (vocabulary, hidden)."""
    module: nn.Module | None = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if module is None or not isinstance(getattr(module, "weight", None), torch.Tensor):
        raise AdapterError(f"{type(model).__name__} has no table of input embeddings to work on.")
    return module


def output_embeddings(model: Any) -> nn.Module | None:
    """The head that turns the last hidden state into logits, or None where the model shows none."""
    head: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Every linear layer by its full name: nn.Linear and its quantised kin, and GPT-2's Conv1D; never the head."""
    from transformers.pytorch_utils import Conv1D

    head = output_embeddings(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def is_transposed(model: Any) -> bool:
    """Whether the linear layers keep their weights as (in, out), as GPT-2's do, which PEFT wants to be told."""
    return any(type(module).__name__ == "Conv1D" for module in linear_layers(model).values())


def hidden_size(model: Any) -> int:
    """The width of the hidden state that decoder layers hand on."""
    return int(text_config(model).hidden_size)


def shape_of(model: Any) -> str:
    """The shape that an adapter has to fit, in words."""
    config = text_config(model)
    return f"{config.num_hidden_layers} layers of {config.hidden_size}"


def key_value_width(model: Any) -> int:
    """How many numbers one layer keeps as keys of one token."""
    config = text_config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads))


def sliding_window(model: Any) -> int | None:
    """How far back the layers with a sliding window see; None where every layer sees everything."""
    config = text_config(model)
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None


def device_of(model: Any) -> torch.device:
    """Where the input embeddings lie: where token ids have to be."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def is_quantised(model: Any) -> bool:
    """Whether any weight is held in fewer bits than it computes with (nf4)."""
    return bool(getattr(model, "is_quantized", False)) or any(
        type(module).__name__ in ("Linear4bit", "Linear8bitLt") for module in model.modules()
    )


def pin_quantised_numbers(model: Any) -> None:
    """Keep a quantised base computing the same numbers all its life, in training and in evaluation.

    Left alone on a CPU with bf16 units, bitsandbytes repacks a 4-bit weight on its first evaluation, for good and with
    loss (bitsandbytes 0.50.2: logits move by 0.002), and gradients through a repacked weight are silently wrong.
    Raises: AdapterError when that has happened already.
    """
    states = [getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules()]
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise AdapterError(
            "The 4-bit weights of this base were repacked for the CPU by an evaluation: they no longer hold their "
            "values and cannot be trained through. Load the base again."
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def without_quantisation(model: Any) -> nn.Module:
    """Turn a quantised model, in place, into a float32 one that computes what its quantised weights stood for.

    Raises: AdapterError when bitsandbytes has repacked the weights: their values are lost.
    """
    if not is_quantised(model):
        return model.float()  # type: ignore[no-any-return]
    pin_quantised_numbers(model)
    plain: nn.Module = model.dequantize(torch.float32)
    return plain.float()
