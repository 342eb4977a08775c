"""An adapter on its way into a stack or out of one: its kind, its tensors and its config, as its folder has them.

A folder is read and written here without PEFT: lora and prefix folders are plain PEFT folders, reft and embedding are
ours. What no stack can hold is refused here, with the reason.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.adapters import anatomy, files, through_peft
from toolkit.adapters.kinds import kind_in_folder, kind_of
from toolkit.errors import AloneError

KINDS = ("lora", "prefix", "reft", "embedding")
ALONE = "It trains alone, and is served merged or on its own."
# What a PEFT folder may not say: key, the values that mean nothing, and why the others cannot stand in a stack.
PEFT_REFUSALS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("use_dora", (False,), "DoRA divides by the length of whole weight columns, base included"),
    ("lora_bias", (False,), "it also learns biases"),
    ("bias", ("none",), "it also changes the base's biases"),
    ("use_qalora", (False,), "QALoRA pools the layer's input"),
    ("use_bdlora", ([], {}, False), "BD-LoRA keeps blocks of its matrices alone"),
    ("kasa_config", (), "KaSA scales by singular values"),
    ("velora_config", (), "VeLoRA compresses the layer's input"),
    ("monteclora_config", (), "MonteCLoRA draws its weights anew"),
    ("modules_to_save", ([],), "it keeps whole layers of the base beside the adapter"),
    ("target_parameters", ([],), "it changes parameters that are no linear layer (fused experts)"),
    ("trainable_token_indices", ([], {}), "it also changes the embedding"),
    ("layer_replication", ([],), "it repeats layers of the base"),
    ("alora_invocation_tokens", ([],), "it acts only after certain tokens"),
    ("arrow_config", (), "it routes between other adapters"),
    ("megatron_config", (), "it is made for sharded layers"),
)
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that took something out of the base's weights
SCALES = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Adapter:
    """One adapter apart from any model. `is_raw`: a reft in training, its rotation still to be made orthonormal."""

    kind: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    is_raw: bool = False

    @property
    def hash(self) -> str:
        """Sha256 of what it computes: kind, scale, and names, shapes and values of its tensors, whatever their type."""
        digest = hashlib.sha256(self.kind.encode())
        digest.update(json.dumps({key: self.config.get(key) for key in SCALES}, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.tensors.items()):
            whole = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None).contiguous()
            digest.update(f"{name}{tuple(whole.shape)}".encode())
            digest.update(whole.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def read_adapter(folder: Path, model: nn.Module, *, base_hash: str = "") -> Adapter:
    """The adapter in a folder, ready for a stack on this base (`Stack.add` checks names and shapes against it).

    Raises: AdapterError when the folder holds none, a damaged one or one of another base; AloneError for a kind that no
    stack holds.
    """
    kind = kind_in_folder(folder)
    if kind.name not in KINDS:
        raise AloneError(f"{folder}: no stack can hold an adapter of kind {kind.name}. {ALONE}")
    config = files.read_config(folder)
    if kind.name in ("lora", "prefix"):
        _refuse_special(folder, config)
    else:
        files.check_ours(folder, config, kind.name, {})
    name = files.PEFT_TENSORS if kind.name in ("lora", "prefix") else files.OUR_TENSORS
    tensors = files.read_tensors(folder, name, files.Origin("", base_hash, anatomy.shape_of(model)))
    return Adapter(kind.name, tensors, config)


def new_adapter(
    model: nn.Module, options: Any, *, seed: int, token_ids: Sequence[int] | None = None, tokenizer: Any = None
) -> Adapter:
    """The adapter that `Kind.attach` would put on this base with the same options and seed, ready to learn in a stack.

    The base is left as it was and may be the base of a stack, as long as nothing runs on it meanwhile.
    Raises: AdapterError for options that no stack can train (DoRA, PiSSA, a prefix with projection, other kinds).
    """
    why = {
        "dora": "DoRA divides by the length of whole weight columns",
        "projection": "a prefix with projection learns a network of its own",
    }
    found = [text for key, text in why.items() if getattr(options, key, False) is True]
    if getattr(options, "init", "default") == "pissa":
        found.append("a PiSSA start takes part of the base's weights out")
    if options.kind not in KINDS:
        found.append(f"no stack can hold kind {options.kind}")
    if found:
        raise AloneError(f"adapter: {'; '.join(found)}. {ALONE}")
    kind = kind_of(options)
    attached = kind.attach(model, options, seed=seed, token_ids=token_ids, tokenizer=tokenizer)
    try:
        with tempfile.TemporaryDirectory() as folder:
            kind.save(attached, Path(folder))
            made = read_adapter(Path(folder), model)
        if kind.name == "reft":
            raw = {
                f"layers.{name.rsplit('.', 2)[1]}.rotation": tensor.to("cpu", copy=True)
                for name, tensor in kind.state(attached).items()
                if name.endswith(".raw")
            }
            made = replace(made, tensors={**made.tensors, **raw}, is_raw=True)
    finally:
        kind.detach(attached)
    return made


def write_adapter(adapter: Adapter, folder: Path, model: nn.Module, *, base: str = "", base_hash: str = "") -> None:
    """Write an adapter into a fresh folder, as its kind would: lora and prefix open in plain PEFT."""
    origin = files.Origin(base, base_hash, anatomy.shape_of(model))
    if adapter.kind in ("lora", "prefix"):
        through_peft.write(folder, adapter.kind, adapter.config, adapter.tensors, origin)
        return
    files.write_tensors(folder / files.OUR_TENSORS, adapter.tensors, adapter.kind, origin)
    files.write_config(folder, {**adapter.config, "base": base, "base_hash": base_hash})


def _refuse_special(folder: Path, config: Mapping[str, Any]) -> None:
    found = [
        f"{key}: {why}" for key, plain, why in PEFT_REFUSALS if config.get(key) is not None and config[key] not in plain
    ]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        found.append(f"init_lora_weights: a {start} start changed the base's own weights")
    if found:
        raise AloneError(f"{folder}: no stack can hold this adapter ({'; '.join(found)}). {ALONE}")
