"""Every weight learns: the adapter is a model of its own, saved as a plain Hugging Face folder (config.json and
safetensors).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolkit.adapters import anatomy, files
from toolkit.adapters.contract import Kind, freeze
from toolkit.errors import AdapterError

if TYPE_CHECKING:
    from toolkit.recipe.model import Full

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class FullKind(Kind["Full"]):
    """Kind `full`. `max_shard_size`: the largest file of weights, as in "12MB"."""

    name = "full"
    mergeable = True

    def __init__(self, max_shard_size: str = "5GB") -> None:
        self.max_shard_size = max_shard_size

    def attach(
        self,
        model: nn.Module,
        options: "Full",
        *,
        seed: int,
        token_ids: Sequence[int] | None = None,
        tokenizer: Any = None,
    ) -> nn.Module:
        """See Kind.attach: nothing is added, and all of the model learns."""
        del options, seed, token_ids, tokenizer
        if anatomy.is_quantised(model):
            raise AdapterError("Kind full cannot train a quantised base. Set base.quantize to none, or use kind lora.")
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """See Kind.parameters; a tied head is named once, as the embedding."""
        return {name: tensor.detach() for name, tensor in model.named_parameters()}

    def save(self, model: nn.Module, folder: Path, *, base: str = "", base_hash: str = "") -> None:
        """See Kind.save. The weights stand alone, so nothing of the base is recorded."""
        del base, base_hash
        model.save_pretrained(folder, max_shard_size=self.max_shard_size)  # type: ignore[operator]

    def load(self, model: nn.Module, folder: Path, *, base_hash: str = "") -> nn.Module:
        """See Kind.load: any model of the same shape takes the weights, so `base_hash` decides nothing."""
        del base_hash
        found = _read_weights(folder)
        own = dict(model.named_parameters())
        for name, source in getattr(model, "all_tied_weights_keys", {}).items():
            if name in found and source in found and torch.equal(found[name], found[source]):
                del found[name]
        files.check_layout(folder, self.name, found, {name: tensor.shape for name, tensor in own.items()})
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(found[name])
        freeze(model)
        return model.eval()

    def merge(self, model: nn.Module) -> nn.Module:
        """See Kind.merge: the model itself."""
        return model.float().eval()


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a saved model, whole and finite."""
    if not (folder / INDEX).is_file():
        return files.read_tensors(folder, WEIGHTS)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(_shards(folder))):
        tensors |= files.read_tensors(folder, shard)
    return tensors


def _shards(folder: Path) -> list[str]:
    """The shards that the index names; AdapterError for an index that cannot be read or points out of the folder."""
    try:
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        shards = [str(name) for name in names]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise AdapterError(f"{folder / INDEX}: cannot be read ({error}). Copy the model again.") from error
    if any(Path(shard).name != shard for shard in shards):
        raise AdapterError(
            f"{folder / INDEX}: names files outside its folder, so none of it is read. Copy the model again."
        )
    return shards
