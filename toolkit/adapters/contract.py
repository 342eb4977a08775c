"""What every kind of adapter does: the one seam between a recipe's `adapter` section and the tensors it trains.

A kind is stateless: everything it knows about an attached adapter lies in the model it returned.
tests/contracts/test_adapter_contract.py is the conformance test; a new kind is done when it passes.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from toolkit.adapters import anatomy
from toolkit.errors import AdapterError

OptionsT = TypeVar("OptionsT")

# How far the logits of a merged model may lie from base + adapter: this share of the largest logit, or this much where
# it is below 1.
MERGE_TOLERANCE = 1e-5


class Kind(ABC, Generic[OptionsT]):
    """One kind of adapter.

    `name` is the word in a recipe. `stackable`: the stack can hold it beside others on one base. `mergeable`: a plain
    model can hold base and adapter in its own weights (a kind may still refuse for one base).
    """

    name: str
    stackable: bool = False
    mergeable: bool = False

    @abstractmethod
    def attach(
        self,
        model: nn.Module,
        options: OptionsT,
        *,
        seed: int,
        token_ids: Sequence[int] | None = None,
        tokenizer: Any = None,
    ) -> nn.Module:
        """Put a new adapter on a base: the model returned trains nothing else and is called like the base.

        The base is changed in place and belongs to the model returned. The same seed gives the same adapter, and the
        global random state is left as it was. `token_ids` (kind embedding): the tokens that may learn, None for all.
        `tokenizer` (kind prefix): needed when the prefix starts from a text.
        Raises: AdapterError when the options do not fit the base.
        """

    @abstractmethod
    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's tensors by the names they are saved under, as they would be saved now."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, *, base: str = "", base_hash: str = "") -> None:
        """Write the adapter into a fresh folder: safetensors and a JSON config, nothing of the base.

        `base`: its name as the user wrote it; `base_hash`: its fingerprint. Both are stored, so that `load` can tell
        another base.
        """

    @abstractmethod
    def load(self, model: nn.Module, folder: Path, *, base_hash: str = "") -> nn.Module:
        """Put a saved adapter on a fresh base, frozen and ready to answer, with the very numbers that were saved.

        Raises: AdapterError when it was made for another base (a hash, a name or a shape differs), is truncated, holds
        a value that is not finite, or is a pickle. After an error the base may be half changed: load it again.
        """

    @abstractmethod
    def merge(self, model: nn.Module) -> nn.Module:
        """A plain float32 model whose logits are those of base + adapter in float32; `model` is used up.

        Raises: AdapterError where the kind or this base does not allow it, or where the logits turn out to differ.
        """

    def detach(self, model: nn.Module) -> nn.Module:
        """The base alone again, with the very numbers it had before `attach`; its parameters are left frozen.

        Raises: AdapterError for a kind that changed the base's own weights.
        """
        raise AdapterError(f"An adapter of kind {self.name} changes the base's own weights. Load the base again.")

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors that training changes, exactly as training holds them: what a checkpoint needs beside the
        optimizer's.
        """
        return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}

    def restore(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Give an adapter attached with the same options the values that `state` had: training goes on bit for bit."""
        own = self.state(model)
        wrong = sorted(own.keys() ^ state.keys()) + sorted(
            name for name in own.keys() & state.keys() if own[name].shape != state[name].shape
        )
        if wrong:
            raise AdapterError(
                f"This state is of another {self.name} adapter: {', '.join(wrong[:5])} do not agree. "
                "Attach with the options and the base of the run that wrote it."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, everything random follows from `seed`; afterwards the random state is what it was before."""
    import numpy

    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


def freeze(model: nn.Module) -> None:
    """Nothing of the model learns any more."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def probe_logits(model: nn.Module, token_ids: Sequence[int] = ()) -> Tensor:
    """The model's float32 logits on two short rows that are always the same; `token_ids` are mixed in."""
    vocabulary = anatomy.text_config(model).vocab_size
    some = torch.arange(32) * 7919 % vocabulary
    if len(token_ids):
        some[1::2] = torch.tensor(token_ids)[torch.arange(16) * 7919 % len(token_ids)]
    rows = some.reshape(2, 16).to(anatomy.device_of(model))
    with torch.no_grad():
        logits: Tensor = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
    return logits.float()


def check_merged(kind: str, before: Tensor, after: Tensor) -> None:
    """Raise AdapterError unless the merged logits are those of base + adapter."""
    limit = MERGE_TOLERANCE * max(1.0, before.abs().max().item())
    off = (before - after).abs().max().item()
    if not off <= limit:
        raise AdapterError(
            f"Merged, this {kind} adapter answers differently: logits differ by {off:.2g} (allowed: {limit:.2g}). "
            "Serve it as an adapter instead."
        )


def refuse_merge(kind: str, why: str) -> AdapterError:
    """The error of a kind that no plain model can hold."""
    return AdapterError(
        f"An adapter of kind {kind} cannot be merged: {why}. Serve or share it as an adapter; "
        "kinds lora, embedding and full can be merged."
    )
