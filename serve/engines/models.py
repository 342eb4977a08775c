"""The models of one server: its runs and their base, opened, the base's weights held once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from serve.engines.contract import Served
from serve.names import BASE
from serve.runs import stands_alone
from toolkit.adapters.opened import open_model
from toolkit.bundle import RUN_FILE, Run
from toolkit.disk import hash_file, hash_text
from toolkit.loaded import LoadedRun, load_run


@dataclass(frozen=True)
class Model:
    """A name that answers, and what it answers with."""

    served: Served
    loaded: LoadedRun


def open_models(runs: Sequence[Run], device: str) -> dict[str, Model]:
    """Every run and, where its weights are its own, the bare base; the base's weights lie in memory once.

    Raises: what load_run raises. Needs memory for two copies of the base while it loads.
    """
    models: dict[str, Model] = {}
    if not stands_alone(runs[0]):
        models[BASE] = _model(BASE, load_run(runs[0].path, device, with_adapter=False))
    for run in runs:
        models[run.name] = _model(run.name, load_run(run.path, device))
        share_weights(models[next(iter(models))].loaded.model, models[run.name].loaded.model)
    return models


def share_weights(owner: nn.Module, other: nn.Module) -> int:
    """Let `other` hold the weights that it has in common with `owner` only once; the number of shared tensors.

    Only what is equal bit for bit is shared, so no answer changes; both must be frozen.
    """
    own = {_plain_name(name): parameter for name, parameter in owner.named_parameters()}
    n_shared = 0
    for name, parameter in other.named_parameters():
        twin = own.get(_plain_name(name))
        if twin is not None and twin is not parameter and type(twin) is type(parameter) and _is_equal(twin, parameter):
            parameter.data = twin.data
            n_shared += 1
    return n_shared


def _model(name: str, loaded: LoadedRun) -> Model:
    run, is_base = loaded.run, name == BASE
    opened = open_model(loaded.model)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    served = Served(
        name=name,
        adapter=None if is_base else run.name,
        base=loaded.base.source if is_base or not stands_alone(run) else run.name,
        base_hash=loaded.base.hash,
        weights_hash=loaded.base.hash if is_base or stands_alone(run) else _adapter_hash(run.adapter()),
        context=loaded.base.context - opened.n_prefix,
        task="chat" if is_base else str(loaded.facts.get("task", "chat")),
        defaults=loaded.sampling,
        created=int((run.path / RUN_FILE).stat().st_mtime),
    )
    return Model(served, loaded)


def _adapter_hash(folder: Path) -> str:
    return hash_text("\n".join(f"{path.name} {hash_file(path)}" for path in _weight_files(folder)))


def _weight_files(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.safetensors"))


def _plain_name(name: str) -> str:
    """A parameter's name without what PEFT puts around a layer."""
    return name.removeprefix("base_model.model.").removeprefix("base_model.").replace(".base_layer.", ".")


def _is_equal(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same and one.dtype.is_floating_point and torch.equal(one, other)
