"""A sentence encoder of the user's for routers of kind embedding: text in, one vector of length 1 out.

Where sentence-transformers is installed it opens the encoder; a plain folder of an encoder (BERT and the like) needs
transformers alone, its tokens' last hidden states averaged, which is what sentence-transformers makes of such a folder.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from toolkit.bases.fetch import find_folder
from toolkit.bases.files import hash_files
from toolkit.errors import BaseError
from toolkit.recipe.model import Base

Encoder = Callable[[Sequence[str]], Tensor]
LIBRARY = "sentence_transformers"
MODULES = "modules.json"  # how sentence-transformers describes what follows the model
BATCH = 32


def open_encoder(name: str) -> tuple[Encoder, str]:
    """An encoder by its folder or hub id, and the hash of its files. It gives [C, H] in float32 on the CPU.

    Raises: BaseError where it is not there, cannot be opened, or needs sentence-transformers and that is missing.
    """
    folder = find_folder(Base(model=name), weights=True)
    weights = sorted(folder.rglob("*.safetensors"))
    if not weights:
        raise BaseError(f"{name}: there are no safetensors in {folder}, and nothing else is opened. Get them.")
    found = hash_files(folder, [*weights, *sorted(folder.glob(MODULES))])
    try:
        encode = _through_library(folder, name) if _needs_library(folder, name) else _through_transformers(folder)
    except BaseError:
        raise
    except Exception as error:  # a broken file shows as any error of any library below
        says = " ".join(str(error).split())[:300] or type(error).__name__
        raise BaseError(f"{name}: this encoder cannot be opened ({says}). Get its files again.") from None
    return encode, found


def _needs_library(folder: Path, name: str) -> bool:
    if not (folder / MODULES).is_file():
        return False
    if find_spec(LIBRARY) is None:
        raise BaseError(
            f"{name}: this encoder is opened by sentence-transformers, which is not installed. Install it with `pip "
            "install sentence-transformers`, or set combine.router: classifier, which needs no encoder."
        )
    return True


def _through_library(folder: Path, name: str) -> Encoder:
    from importlib import import_module

    opened: Any = import_module(LIBRARY).SentenceTransformer(str(folder), device="cpu", local_files_only=True)

    def encode(texts: Sequence[str]) -> Tensor:
        vectors: Tensor = opened.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return normalize(vectors.float().cpu(), dim=1)

    return encode


def _through_transformers(folder: Path) -> Encoder:
    from transformers import AutoModel, AutoTokenizer

    loader: Any = AutoModel
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = loader.from_pretrained(folder, use_safetensors=True, local_files_only=True, dtype=torch.float32).eval()
    longest = min(int(model.config.max_position_embeddings), int(tokenizer.model_max_length), 512)

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        rows = []
        for start in range(0, len(texts), BATCH):
            given = tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            states = model(**given).last_hidden_state
            mask = given["attention_mask"][..., None].to(states.dtype)
            rows.append((states * mask).sum(1) / mask.sum(1).clamp_min(1.0))
        return normalize(torch.cat(rows), dim=1)

    return encode
