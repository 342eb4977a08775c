"""LoReFT: a low-rank edit of hidden states at the output of decoder layers, at every position (arXiv 2404.03592).

At every position, so that a cached or chunked answer is the answer of one pass. PEFT has no ReFT; this is ours, in a
folder of our own: adapter_config.json with kind and version, adapter.safetensors with layers.N.{rotation,weight,bias}.
"""

# B rows, T tokens, H hidden, R rank.

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from toolkit.adapters import anatomy, files
from toolkit.adapters.contract import Kind, freeze, refuse_merge, seeded
from toolkit.errors import AdapterError

if TYPE_CHECKING:
    from toolkit.recipe.model import Reft

MODULE = "maltu_reft"  # where the edits hang on the base


def orthonormal(matrix_RH: Tensor) -> Tensor:
    """Rows that are orthonormal and span what the rows of the matrix span; differentiable, and its own value for
    what is already so. Leading axes are a batch of matrices.
    """
    q_HR, triangle_RR = torch.linalg.qr(matrix_RH.float().mT)
    rows_RH: Tensor = (q_HR * triangle_RR.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT
    return rows_RH


class Edit(nn.Module):
    """The edit of one layer: h + R^T (W h + b - R h), which is nothing at first (W starts as R, b as 0).

    While it trains, R is made orthonormal from `raw` at every step. When it was loaded, R is `raw` itself, bit for bit
    as it was saved.
    """

    def __init__(self, hidden: int, rank: int, dropout: float, *, is_final: bool = False) -> None:
        super().__init__()
        self.is_final = is_final
        self.raw = nn.Parameter(torch.empty(rank, hidden, dtype=torch.float32))
        nn.init.orthogonal_(self.raw)
        self.weight = nn.Parameter(orthonormal(self.raw).detach().contiguous().clone())
        self.bias = nn.Parameter(torch.zeros(rank, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout)
        self._kept: tuple[int, Tensor] | None = None

    def rotation_RH(self) -> Tensor:
        """R. Kept between evaluation steps until `raw` changes; worked out anew whenever gradients are on."""
        if self.is_final:
            return self.raw
        if self.training or torch.is_grad_enabled():
            self._kept = None
            return orthonormal(self.raw)
        if self._kept is None or self._kept[0] != self.raw._version or self._kept[1].device != self.raw.device:
            self._kept = (self.raw._version, orthonormal(self.raw))
        return self._kept[1]

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """The edited hidden state; computed in float32 and added in the hidden state's own type."""
        rotation_RH = self.rotation_RH()
        moved_BTR = functional.linear(hidden_BTH.float(), self.weight.float() - rotation_RH, self.bias.float())
        edit_BTH: Tensor = self.dropout(moved_BTR @ rotation_RH)
        return hidden_BTH + edit_BTH.to(hidden_BTH.dtype)

    def on_output(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The forward hook of a decoder layer: edits the hidden state, which is the output or the first of it."""
        del module, inputs
        return (self(output[0]), *output[1:]) if isinstance(output, tuple) else self(output)


class Edits(nn.Module):
    """All edits of one adapter, hung on their layers."""

    def __init__(self, edits: dict[int, Edit], chosen: str | list[int]) -> None:
        super().__init__()
        self.chosen = chosen
        self.layers = nn.ModuleDict({str(index): edit for index, edit in edits.items()})
        self.handles: list[RemovableHandle] = []

    def each(self) -> list[tuple[int, Edit]]:
        """The edits with the numbers of their layers."""
        return [(int(index), edit) for index, edit in self.layers.items() if isinstance(edit, Edit)]

    def tensors(self) -> dict[str, Tensor]:
        """What is saved: R as it is used, W and b."""
        with torch.no_grad():
            return {
                f"layers.{index}.{name}": tensor.detach()
                for index, edit in self.each()
                for name, tensor in (
                    ("rotation", edit.rotation_RH()),
                    ("weight", edit.weight),
                    ("bias", edit.bias),
                )
            }


class ReftKind(Kind["Reft"]):
    """Kind `reft`."""

    name = "reft"
    stackable = True

    def attach(
        self,
        model: nn.Module,
        options: "Reft",
        *,
        seed: int,
        token_ids: Sequence[int] | None = None,
        tokenizer: Any = None,
    ) -> nn.Module:
        """See Kind.attach; starts as no edit at all, so the first answers are the base's own."""
        del token_ids, tokenizer
        hidden, count = anatomy.hidden_size(model), len(anatomy.decoder_layers(model))
        if options.rank > hidden:
            raise AdapterError(
                f"adapter.rank: {options.rank} is more than the base's hidden size. Use at most {hidden}."
            )
        chosen = _chosen_layers(options.layers, count)
        with seeded(seed):
            edits = {index: Edit(hidden, options.rank, options.dropout) for index in chosen}
        freeze(model)
        said = "all" if isinstance(options.layers, str) else chosen
        return _hang(model, Edits(edits, said))

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """See Kind.parameters."""
        return _edits_of(model).tensors()

    def save(self, model: nn.Module, folder: Path, *, base: str = "", base_hash: str = "") -> None:
        """See Kind.save."""
        edits, origin = _edits_of(model), files.Origin(base, base_hash, anatomy.shape_of(model))
        _, first = edits.each()[0]
        files.write_tensors(folder / files.OUR_TENSORS, edits.tensors(), self.name, origin)
        config = {
            "kind": self.name,
            "version": files.VERSION,
            "rank": first.raw.shape[0],
            "layers": edits.chosen,
            "hidden": first.raw.shape[1],
            "n_layers": len(anatomy.decoder_layers(model)),
            "dropout": first.dropout.p,
            "base": base,
            "base_hash": base_hash,
        }
        files.write_config(folder, config)

    def load(self, model: nn.Module, folder: Path, *, base_hash: str = "") -> nn.Module:
        """See Kind.load."""
        config = files.read_config(folder)
        files.check_ours(folder, config, self.name, {"rank": int, "hidden": int, "n_layers": int})
        hidden, layers = anatomy.hidden_size(model), len(anatomy.decoder_layers(model))
        if (config["hidden"], config["n_layers"]) != (hidden, layers):
            raise AdapterError(
                f"{folder}: made for a base with {config['n_layers']} layers of {config['hidden']}; this one has "
                f"{layers} of {hidden}. "
                f"Load the base it was trained on{': ' + str(config['base']) if config.get('base') else ''}."
            )
        chosen = _chosen_layers(config.get("layers", "all"), layers)
        tensors = files.read_tensors(folder, files.OUR_TENSORS, files.Origin("", base_hash, anatomy.shape_of(model)))
        rank = config["rank"]
        shapes = {"rotation": (rank, hidden), "weight": (rank, hidden), "bias": (rank,)}
        wanted = {f"layers.{index}.{name}": torch.Size(shape) for index in chosen for name, shape in shapes.items()}
        files.check_layout(folder, self.name, tensors, wanted)
        with seeded(0):
            edits = {index: Edit(hidden, rank, float(config.get("dropout", 0.0)), is_final=True) for index in chosen}
        with torch.no_grad():
            for index, edit in edits.items():
                edit.raw.copy_(tensors[f"layers.{index}.rotation"])
                edit.weight.copy_(tensors[f"layers.{index}.weight"])
                edit.bias.copy_(tensors[f"layers.{index}.bias"])
        model = _hang(model, Edits(edits, config.get("layers", "all")))
        freeze(model)
        return model.eval()

    def merge(self, model: nn.Module) -> nn.Module:
        """Always refused."""
        raise refuse_merge(self.name, "it edits the hidden state between layers, which no weight of the base does")

    def detach(self, model: nn.Module) -> nn.Module:
        """See Kind.detach."""
        edits = _edits_of(model)
        for handle in edits.handles:
            handle.remove()
        delattr(model, MODULE)
        return model


def _chosen_layers(layers: str | Sequence[int], count: int) -> list[int]:
    """The layer numbers, in order, once each; AdapterError for those the base does not have."""
    if isinstance(layers, str):
        if layers != "all":
            near = difflib.get_close_matches(layers, ["all"])
            raise AdapterError(
                f"adapter.layers: '{layers}' is not a choice.{' Did you mean all?' if near else ' Use all or a list.'}"
            )
        return list(range(count))
    wrong = [index for index in layers if not 0 <= index < count]
    if wrong or not layers:
        raise AdapterError(
            f"adapter.layers: {wrong or 'an empty list'} does not fit a base of {count} layers. Use 0 to {count - 1}."
        )
    return sorted(set(layers))


def _hang(model: nn.Module, edits: Edits) -> nn.Module:
    """Register the edits on the model and on their layers; each edit lives where its layer does."""
    if hasattr(model, MODULE):
        raise AdapterError("This model already has a reft adapter. Detach it, or load the base again.")
    anatomy.pin_quantised_numbers(model)
    layers = anatomy.decoder_layers(model)
    for index, edit in edits.each():
        edit.to(next(layers[index].parameters()).device)
        edit.train(model.training)
        edits.handles.append(layers[index].register_forward_hook(edit.on_output))
    edits.train(model.training)
    setattr(model, MODULE, edits)
    return model


def _edits_of(model: nn.Module) -> Edits:
    edits = getattr(model, MODULE, None)
    if not isinstance(edits, Edits):
        raise AdapterError("This model has no reft adapter. Attach or load one first.")
    return edits
