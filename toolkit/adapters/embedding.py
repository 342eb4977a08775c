"""Only the input embeddings learn: a delta for each token id seen in training, added at the embedding's output.

The head stays as it is even where it is tied to the embedding. Our own folder: adapter_config.json with kind and
version, adapter.safetensors with `token_ids` (N) and `delta` (N, hidden).
"""

# B rows, T tokens, H hidden, N token ids that may learn, V vocabulary.

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from toolkit.adapters import anatomy, files
from toolkit.adapters.contract import Kind, check_merged, freeze, probe_logits
from toolkit.errors import AdapterError

if TYPE_CHECKING:
    from toolkit.recipe.model import Embedding

MODULE = "maltu_embedding"  # where the delta hangs on the base


class Delta(nn.Module):
    """What is added to the embedding of each token that may learn; nothing at first."""

    token_ids_N: Tensor
    row_of_V: Tensor

    def __init__(self, token_ids_N: Tensor, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.delta_NH = nn.Parameter(torch.zeros(len(token_ids_N), hidden, dtype=torch.float32))
        row_of_V = torch.full((vocabulary,), -1, dtype=torch.long)
        row_of_V[token_ids_N] = torch.arange(len(token_ids_N))
        self.register_buffer("token_ids_N", token_ids_N, persistent=False)
        self.register_buffer("row_of_V", row_of_V, persistent=False)
        self.handle: RemovableHandle | None = None

    def on_output(self, module: nn.Module, inputs: tuple[Any, ...], output_BTH: Tensor) -> Tensor:
        """The forward hook of the embedding: adds each learning token's delta, in the output's own type."""
        del module
        row_BT = self.row_of_V[inputs[0]]
        extra_BTH = functional.embedding(row_BT.clamp(min=0), self.delta_NH) * (row_BT >= 0).unsqueeze(-1)
        return output_BTH + extra_BTH.to(output_BTH.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return {"token_ids": self.token_ids_N, "delta": self.delta_NH.detach()}


class EmbeddingKind(Kind["Embedding"]):
    """Kind `embedding`."""

    name = "embedding"
    stackable = True
    mergeable = True

    def attach(
        self,
        model: nn.Module,
        options: "Embedding",
        *,
        seed: int,
        token_ids: Sequence[int] | None = None,
        tokenizer: Any = None,
    ) -> nn.Module:
        """See Kind.attach. Starts as no change at all, so the seed decides nothing."""
        del options, seed, tokenizer
        vocabulary, hidden = _table_shape(model)
        chosen = sorted(set(range(vocabulary) if token_ids is None else token_ids))
        if not chosen or chosen[0] < 0 or chosen[-1] >= vocabulary:
            raise AdapterError(
                f"token_ids: {len(chosen)} ids, from {chosen[0] if chosen else '-'} to "
                f"{chosen[-1] if chosen else '-'}, do not fit "
                f"a vocabulary of {vocabulary}. Give the ids that this base's own tokenizer made."
            )
        freeze(model)
        return _hang(model, Delta(torch.tensor(chosen), vocabulary, hidden))

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """See Kind.parameters."""
        return _delta_of(model).tensors()

    def save(self, model: nn.Module, folder: Path, *, base: str = "", base_hash: str = "") -> None:
        """See Kind.save."""
        delta = _delta_of(model)
        files.write_tensors(
            folder / files.OUR_TENSORS,
            delta.tensors(),
            self.name,
            files.Origin(base, base_hash, anatomy.shape_of(model)),
        )
        config = {
            "kind": self.name,
            "version": files.VERSION,
            "vocabulary": len(delta.row_of_V),
            "hidden": delta.delta_NH.shape[1],
            "n_tokens": len(delta.token_ids_N),
            "base": base,
            "base_hash": base_hash,
        }
        files.write_config(folder, config)

    def load(self, model: nn.Module, folder: Path, *, base_hash: str = "") -> nn.Module:
        """See Kind.load."""
        config = files.read_config(folder)
        files.check_ours(folder, config, self.name, {"vocabulary": int, "hidden": int, "n_tokens": int})
        vocabulary, hidden = _table_shape(model)
        if (config["vocabulary"], config["hidden"]) != (vocabulary, hidden):
            raise AdapterError(
                f"{folder}: made for a base with {config['vocabulary']} embeddings of {config['hidden']}; this one "
                f"has {vocabulary} of "
                f"{hidden}. Load the base it was trained on{': ' + str(config['base']) if config.get('base') else ''}."
            )
        tensors = files.read_tensors(folder, files.OUR_TENSORS, files.Origin("", base_hash, anatomy.shape_of(model)))
        count = config["n_tokens"]
        wanted = {"token_ids": torch.Size((count,)), "delta": torch.Size((count, hidden))}
        files.check_layout(folder, self.name, tensors, wanted)
        ids = tensors["token_ids"]
        if (
            ids.dtype != torch.long
            or not bool(((ids >= 0) & (ids < vocabulary)).all())
            or len(set(ids.tolist())) != count
        ):
            raise AdapterError(
                f"{folder}: its token ids do not fit a vocabulary of {vocabulary}. Copy the adapter again."
            )
        delta = Delta(ids, vocabulary, hidden)
        with torch.no_grad():
            delta.delta_NH.copy_(tensors["delta"])
        model = _hang(model, delta)
        freeze(model)
        return model.eval()

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """See Kind.state; with the token ids, so that a delta is never given back to other tokens."""
        return _delta_of(model).tensors()

    def restore(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """See Kind.restore."""
        ids = _delta_of(model).token_ids_N
        found = state.get("token_ids")
        if found is None or not torch.equal(found.to(ids.device), ids):
            raise AdapterError(
                "This state is of an embedding adapter for other tokens. Attach with the data of the run that wrote it."
            )
        super().restore(model, state)

    def merge(self, model: nn.Module) -> nn.Module:
        """See Kind.merge. A head tied to the embedding is given weights of its own, so that it stays what it was."""
        delta = _delta_of(model)
        model = anatomy.without_quantisation(model).eval()
        probed = delta.token_ids_N.tolist()
        before = probe_logits(model, probed)
        plain = self.detach(model)
        _untie_head(plain)
        table = anatomy.input_embeddings(plain)
        with torch.no_grad():
            scale = _scale_of(table)
            table.weight[delta.token_ids_N] += delta.delta_NH / scale  # type: ignore[index, operator]
        check_merged(self.name, before, probe_logits(plain, probed))
        return plain

    def detach(self, model: nn.Module) -> nn.Module:
        """See Kind.detach."""
        delta = _delta_of(model)
        if delta.handle is not None:
            delta.handle.remove()
        delattr(model, MODULE)
        return model


def _table_shape(model: nn.Module) -> tuple[int, int]:
    vocabulary, hidden = anatomy.input_embeddings(model).weight.shape  # type: ignore[misc]
    return int(vocabulary), int(hidden)


def _hang(model: nn.Module, delta: Delta) -> nn.Module:
    if hasattr(model, MODULE):
        raise AdapterError("This model already has an embedding adapter. Detach it, or load the base again.")
    anatomy.pin_quantised_numbers(model)
    delta.to(anatomy.device_of(model))
    delta.train(model.training)
    delta.handle = anatomy.input_embeddings(model).register_forward_hook(delta.on_output)
    setattr(model, MODULE, delta)
    return model


def _delta_of(model: nn.Module) -> Delta:
    delta = getattr(model, MODULE, None)
    if not isinstance(delta, Delta):
        raise AdapterError("This model has no embedding adapter. Attach or load one first.")
    return delta


def _untie_head(model: nn.Module) -> None:
    """Give the head a copy of its weights and tell the config, so that saving and loading keep the two apart."""
    table, head = anatomy.input_embeddings(model), anatomy.output_embeddings(model)
    if head is None or head.weight is not table.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
    for config in {id(c): c for c in (model.config, anatomy.text_config(model))}.values():
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    if hasattr(model, "get_expanded_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)  # type: ignore[operator]


def _scale_of(table: nn.Module) -> float:
    """By how much the embedding module multiplies its weights on the way out (Gemma does, by the root of its hidden
    size).
    """
    weight = table.weight
    row = int(weight.detach().norm(dim=1).argmax())  # type: ignore[operator]
    out = table(torch.tensor([[row]], device=weight.device))[0, 0]  # type: ignore[arg-type]
    wanted = weight[row]  # type: ignore[index]
    scale = float((out @ wanted) / (wanted @ wanted))
    if not torch.allclose(out, scale * wanted, rtol=1e-5, atol=0):
        raise AdapterError(
            "This base changes its embeddings on the way out, so a delta cannot be merged into their table. Serve it "
            "as an adapter instead."
        )
    return scale
