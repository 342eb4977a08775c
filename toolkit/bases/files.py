"""The files of a base in a folder: are they there, whole and safe to open, and what is their hash. Opens no model."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from toolkit.errors import BaseError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HEADER_LIMIT = 100_000_000  # bytes; what the safetensors library itself allows


def read_config(folder: Path, source: str, trust_remote_code: bool) -> dict[str, Any]:
    """config.json of a causal language model. Raises BaseError where it is something else, or wants code that is not
    trusted.
    """
    if not (folder / "config.json").is_file():
        raise BaseError(f"{source}: {_why_no_config(folder)}")
    config = _read_json(folder / "config.json", source)
    if not trust_remote_code:
        for name in ("config.json", "tokenizer_config.json"):
            if (folder / name).is_file() and _read_json(folder / name, source).get("auto_map"):
                raise BaseError(
                    f"{source}: its {name} asks to run Python code that lies beside the weights. Read that code, and "
                    "if you trust it set base.trust_remote_code: true; or use another base."
                )
    return config


def weight_files(folder: Path, source: str) -> list[Path]:
    """The safetensors files with the weights, each checked to be whole. Raises BaseError where one is not."""
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (folder / WEIGHTS_INDEX).is_file():
        weight_map = _read_json(folder / WEIGHTS_INDEX, source).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BaseError(f"{source}: {WEIGHTS_INDEX} lists no weights. Get the file again.")
        names = sorted({str(name) for name in weight_map.values()})
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if missing:
            raise BaseError(
                f"{source}: {len(missing)} of {len(names)} weight files are missing ({missing[0]}). Get them again."
            )
    else:
        raise BaseError(f"{source}: {_why_no_weights(folder)}")
    for name in names:
        _check_whole(folder / name, source)
    return [folder / name for name in names]


def hash_files(folder: Path, weights: list[Path]) -> str:
    """sha256 over weights, configuration and tokenizer: names and contents, wherever the folder lies."""
    small = [folder / name for name in ("config.json", *TOKENIZER_FILES)]
    total = hashlib.sha256()
    for path in sorted([*weights, *(path for path in small if path.is_file())], key=lambda path: path.name):
        stat = path.stat()
        digest = _hash_file(path.resolve(), stat.st_size, stat.st_mtime_ns)
        total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=256)
def _hash_file(path: Path, size: int, mtime_ns: int) -> str:  # size and time are there to notice a file that changed
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseError(f"{source}: {path.name} cannot be read as JSON ({error}). Get the file again.") from None
    if not isinstance(value, dict):
        raise BaseError(f"{source}: {path.name} holds no JSON object. Get the file again.")
    return value


def _why_no_config(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "this folder holds an adapter, not a base. Name the base it was made for."
    if any(folder.glob("*.gguf")):
        return "this folder holds gguf files, which cannot be trained. Use the same model in safetensors form."
    return "this folder has no config.json, so it is not a model as transformers writes one. Name its folder."


def _why_no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return (
            f"its weights are pickled ({pickles[0]}), and opening a pickle runs whatever code is in it; only "
            "safetensors are opened. Take a version in safetensors, or convert it on a machine you can spare: load "
            "it there with transformers and call save_pretrained(FOLDER), which writes safetensors."
        )
    return f"there is no {WEIGHTS} (nor {WEIGHTS_INDEX}) in {folder}. Get the weights in safetensors form."


def _check_whole(path: Path, source: str) -> None:
    """A safetensors file says how long it is: 8 bytes of header length, the header in JSON, the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        n_header = int.from_bytes(first, "little")
        if first == b"version ":
            raise BaseError(
                f"{source}: {path.name} is a Git LFS pointer, not the weights. Run `git lfs pull` in that folder."
            )
        header = file.read(n_header) if 8 + n_header <= size and n_header <= _HEADER_LIMIT else b""
    try:
        tensors = json.loads(header)
        end = max((int(t["data_offsets"][1]) for name, t in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        end = -1
    if end < 0 or 8 + n_header + end != size:
        raise BaseError(f"{source}: {path.name} is damaged or cut short ({size:,} bytes). Get the file again.")
