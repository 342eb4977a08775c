"""What lora, prefix and PEFT's other kinds share: attach, save, load and merge through PEFT, its silences made loud.

A saved folder is a plain PEFT folder: `PeftModel.from_pretrained(base, folder)` opens it. PEFT takes seconds to import,
so it is imported inside functions.
"""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor, nn

from toolkit.adapters import anatomy, files
from toolkit.adapters.contract import check_merged, freeze, probe_logits, seeded
from toolkit.errors import AdapterError

# What PEFT and torch raise about options that do not fit a base: no class of their own tells these from others.
PEFT_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    ZeroDivisionError,
    IndexError,
)

# Warnings of PEFT 0.21.2 and what it imports that say nothing to our users; everything else is passed on.
HARMLESS = (
    r"`torch\.jit\.script",  # torch's own import, through bitsandbytes
    r"`is_gradient_checkpointing` is deprecated",  # PEFT asks transformers by the older name
    r"Unsupported layer type '.*Norm",  # kind ln_tuning means exactly those
    r"Failed to load the CUDA extension",  # kind boft works without
    r"Setting boft_n_butterfly_factor to 1",
    r"Sparse invariant checks are implicitly disabled",  # kind frod
    r"Detected that the base layer has no bias",  # kind beft; merging is refused when it is asked for
)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the warnings known to be harmless are not shown."""
    with warnings.catch_warnings():
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message=message)
        yield


def attach(model: nn.Module, config: Any, *, kind: str, seed: int) -> Any:
    """PEFT's model around the base, with the adapter that the config describes; nothing else learns.

    Raises: AdapterError when PEFT refuses, or when nothing would learn.
    """
    refuse_second(model)
    anatomy.pin_quantised_numbers(model)
    was_training = model.training
    with quiet(), seeded(seed):
        import peft

        try:
            wrapped = peft.get_peft_model(model, config)
        except PEFT_ERRORS as error:
            raise AdapterError(
                f"{kind}: PEFT cannot put this adapter on {type(model).__name__}: {said(error)}"
            ) from error
    if not any(parameter.requires_grad for parameter in wrapped.parameters()):
        raise AdapterError(f"{kind}: nothing of this adapter would learn on {type(model).__name__}. Use another kind.")
    return wrapped.train(was_training)


def refuse_second(model: nn.Module) -> None:
    """AdapterError for a model that already carries an adapter of PEFT."""
    if hasattr(model, "peft_config"):
        raise AdapterError("This model already has an adapter. Detach it, or load the base again.")


def config_of(model: nn.Module) -> Any:
    """The PEFT config of the adapter that answers."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise AdapterError("This model has no adapter of PEFT. Attach or load one first.")
    return configs[_active(model)]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    import peft

    config_of(model)
    with quiet():
        found: dict[str, Tensor] = peft.get_peft_model_state_dict(
            model, adapter_name=_active(model), save_embedding_layers=False
        )
    return found


def save(model: nn.Module, folder: Path, *, kind: str, origin: files.Origin) -> None:
    """Write a plain PEFT folder, the same bytes for the same adapter; the base is named as its user named it."""
    config = config_of(model)
    write(folder, kind, config.to_dict(), parameters(model), origin)


def write(
    folder: Path, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: files.Origin
) -> None:
    """Write a plain PEFT folder from a config and tensors."""
    files.write_tensors(folder / files.PEFT_TENSORS, tensors, kind, origin)
    named = origin.base or _without_private_path(config.get("base_model_name_or_path"))
    plain = {key: _plain(value) for key, value in config.items()}
    files.write_config(folder, plain | {"base_model_name_or_path": named, "inference_mode": True})


def load(model: nn.Module, folder: Path, *, kind: str, base_hash: str) -> Any:
    """PEFT's model around the base with the saved adapter, frozen; every tensor of the file found its place.

    Raises: AdapterError when the folder is no adapter for this base.
    """
    refuse_second(model)
    config = files.read_config(folder)
    if not isinstance(config.get("peft_type"), str):
        raise AdapterError(
            f"{folder}: its {files.CONFIG} names no peft_type, so it is not an adapter of PEFT. Copy the adapter again "
            "from where it was made."
        )
    tensors = files.read_tensors(folder, files.PEFT_TENSORS, files.Origin("", base_hash, anatomy.shape_of(model)))
    anatomy.pin_quantised_numbers(model)
    with quiet(), seeded(0), warnings.catch_warnings():
        # PEFT warns of missing names and passes over those without a place; both are errors below.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        import peft

        try:
            wrapped = peft.PeftModel.from_pretrained(model, str(folder), torch_device=str(anatomy.device_of(model)))
        except PEFT_ERRORS as error:
            raise AdapterError(
                f"{folder}: this {kind} adapter does not fit {type(model).__name__}: {said(error)} Load the base it "
                "was trained on."
            ) from error
    if wrapped.active_peft_config.is_prompt_learning:
        _check_prompt(model, folder, kind, wrapped.active_peft_config)
    files.check_layout(folder, kind, tensors, {name: tensor.shape for name, tensor in parameters(wrapped).items()})
    freeze(wrapped)
    return wrapped.eval()


def merge(model: Any, *, kind: str) -> nn.Module:
    """The base in float32 with the adapter in its weights; a quantised base is first turned into what its weights
    stand for.
    """
    config = config_of(model)
    if anatomy.is_quantised(model):
        model = _on_plain_base(model, config, kind)
    model = model.float().eval()
    before = probe_logits(model)
    with quiet():
        try:
            merged: nn.Module = model.merge_and_unload(safe_merge=True)
        except PEFT_ERRORS as error:
            raise AdapterError(
                f"{kind}: PEFT cannot merge this adapter: {said(error)} Serve it as an adapter instead."
            ) from error
    check_merged(kind, before, probe_logits(merged))
    return merged


def detach(model: Any, *, kind: str) -> nn.Module:
    """The base alone, as it was."""
    config = config_of(model)
    try:
        base: nn.Module = model.get_base_model() if config.is_prompt_learning else model.unload()
    except PEFT_ERRORS as error:
        raise AdapterError(f"{kind}: PEFT cannot take this adapter off ({said(error)}) Load the base again.") from error
    for left in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(left, None)
    freeze(base)
    return base


def _check_prompt(model: nn.Module, folder: Path, kind: str, config: Any) -> None:
    """PEFT builds a prompt from its own config, so one of another base fits itself; it has to fit this base."""
    width = anatomy.key_value_width(model) if kind == "prefix" else anatomy.hidden_size(model)
    layers = anatomy.text_config(model).num_hidden_layers
    if (config.num_layers, config.token_dim) != (layers, width):
        raise AdapterError(
            f"{folder}: this {kind} adapter was made for another base, of {config.num_layers} layers with "
            f"{config.token_dim} numbers a token, not {layers} with {width}. Load the base it was trained on."
        )


def _on_plain_base(model: Any, config: Any, kind: str) -> Any:
    """The same adapter on the float32 model that the quantised base stands for."""
    import peft

    tensors = {name: tensor.detach().clone() for name, tensor in parameters(model).items()}
    plain = anatomy.without_quantisation(model.unload())
    plain.__dict__.pop("peft_config", None)
    learning = copy.copy(config)
    learning.inference_mode = False  # a loaded adapter is for inference, and attach refuses what learns nothing
    wrapped = attach(plain, learning, kind=kind, seed=0)
    with quiet():
        peft.set_peft_model_state_dict(wrapped, tensors)
    return wrapped


def _active(model: nn.Module) -> str:
    active = getattr(model, "active_adapter", "default")
    return active if isinstance(active, str) else active[0]


def said(error: BaseException) -> str:
    """What PEFT said, on one line that ends as a sentence."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    text = text if len(text) <= 400 else text[:400] + "…"
    return text if text.endswith((".", "…", "!")) else text + "."


def _without_private_path(name: str | None) -> str | None:
    """A base's name as others may read it: an absolute path gives only its last part."""
    return PurePath(name).name if name and PurePath(name).is_absolute() else name


def _plain(value: Any) -> Any:
    """A config value as JSON holds it; a set in order, so that the same adapter gives the same bytes."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return getattr(value, "value", value)
