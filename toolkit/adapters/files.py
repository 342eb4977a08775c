"""Adapter folders on disk: safetensors and JSON only, checked before anything is believed.

Every file of tensors carries, in its safetensors metadata, the kind, the base's name and the base's hash; plain PEFT
ignores them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from toolkit.errors import AdapterError

CONFIG = "adapter_config.json"
OUR_TENSORS = "adapter.safetensors"
PEFT_TENSORS = "adapter_model.safetensors"
VERSION = 1
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Origin:
    """What an adapter was made for: the name its user gave the base, its fingerprint and shape; each may be empty."""

    base: str = ""
    base_hash: str = ""
    shape: str = ""

    def metadata(self, kind: str) -> dict[str, str]:
        """As it is stored beside the tensors."""
        return {
            "format": "pt",
            "maltu_kind": kind,
            "maltu_version": str(VERSION),
            "maltu_base": self.base,
            "maltu_base_hash": self.base_hash,
            "maltu_base_shape": self.shape,
        }


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{folder}: no {CONFIG}, so this is not an adapter. Name the folder that holds one."
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path}: cannot be read as JSON ({error}). Copy the adapter again from where it was made."
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"{path}: holds a {type(config).__name__} where an adapter's config should be. Copy the adapter again from "
            "where it was made."
        )
    return config


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write adapter_config.json, the same bytes for the same content."""
    text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], kind: str, origin: Origin) -> None:
    """Write tensors with what they were made for, the same bytes for the same content."""
    whole = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    path.write_bytes(_with_sorted_metadata(to_bytes(whole, metadata=origin.metadata(kind))))


def _with_sorted_metadata(data: bytes) -> bytes:
    """The same safetensors file with its metadata in order (safetensors 0.8 writes it in a random one)."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def read_tensors(folder: Path, name: str, here: Origin | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter folder, on the CPU: whole, finite and, as far as is known, for the base that is here.

    Raises: AdapterError otherwise, and when the folder holds a pickle instead.
    """
    path = folder / name
    if not path.is_file():
        raise _missing(folder, name)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path}: truncated or damaged ({error}). Copy it again, or train the adapter again."
        ) from error
    _check_origin(folder, metadata, here or Origin())
    bad = sorted(key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all())
    if bad:
        raise AdapterError(
            f"{path}: {', '.join(bad[:3])} holds values that are not finite. Its training diverged; use an earlier "
            "checkpoint."
        )
    return tensors


def _check_origin(folder: Path, metadata: Mapping[str, str], here: Origin) -> None:
    name = metadata.get("maltu_base") or "unnamed"
    shape, made_for = metadata.get("maltu_base_shape", ""), metadata.get("maltu_base_hash", "")
    if shape and here.shape and shape != here.shape:
        raise AdapterError(
            f"{folder}: made for another base ({name}: {shape}), not for this one ({here.shape}). "
            "Load the base it was trained on."
        )
    if made_for and here.base_hash and made_for != here.base_hash:
        raise AdapterError(
            f"{folder}: made for another base ({name}, {made_for[:12]}…), not for the one loaded "
            f"({here.base_hash[:12]}…). Load the base it was trained on, at the same revision."
        )


def check_layout(folder: Path, kind: str, found: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> None:
    """Raise AdapterError, with names and shapes, unless the tensors found are those that this base's adapter would
    have.
    """
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    wrong += [f"{name} has no place" for name in sorted(found.keys() - wanted.keys())]
    wrong += [
        f"{name} is {tuple(found[name].shape)} where {tuple(wanted[name])} fits"
        for name in sorted(wanted.keys() & found.keys())
        if found[name].shape != wanted[name]
    ]
    if wrong:
        more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
        raise AdapterError(
            f"{folder}: this {kind} adapter was made for another base: {'; '.join(wrong[:4])}{more}. "
            "Load the base it was trained on."
        )


def _missing(folder: Path, name: str) -> AdapterError:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickles:
        return AdapterError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when it is read, so it is not read. "
            "Ask whoever made it for a safetensors file."
        )
    return AdapterError(f"{folder}: no {name}. Copy the whole folder again.")


def check_ours(folder: Path, config: Mapping[str, Any], kind: str, fields: Mapping[str, type]) -> None:
    """Raise AdapterError unless the config is of this kind, of a version we read, and has these fields with these
    types.
    """
    if config.get("kind") != kind:
        found = config.get("kind") or "unknown"
        raise AdapterError(f"{folder}: holds an adapter of kind {found}, not {kind}. Name the folder of a {kind} one.")
    if config.get("version") != VERSION:
        raise AdapterError(
            f"{folder}: its format is version {config.get('version')}; this Maltu reads {VERSION}. Use the Maltu "
            "that wrote it."
        )
    wrong = [name for name, wanted in fields.items() if type(config.get(name)) is not wanted]
    if wrong:
        raise AdapterError(
            f"{folder / CONFIG}: {', '.join(wrong)} missing or of the wrong type. Copy the adapter again."
        )
