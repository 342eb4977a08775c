"""The models of one server: its runs on one base, whose weights lie in memory once.

What a stack can hold is one adapter more in the server's stack; every other run (DoRA, most of PEFT's kinds) is opened
as a model of its own, its base's weights shared where they are equal.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from serve.engines.contract import Served
from serve.engines.slots import unfit
from serve.names import BASE
from serve.runs import stands_alone
from toolkit.adapters.opened import open_model
from toolkit.bundle import RUN_FILE, Run
from toolkit.corpus.render import Renderer
from toolkit.disk import hash_file, hash_text
from toolkit.errors import AdapterError, RunError
from toolkit.loaded import LoadedRun, load_run
from toolkit.stack.adapter import ALONE
from toolkit.stack.stack import Stack

_log = logging.getLogger("maltu.serve.models")


@dataclass(frozen=True)
class Model:
    """A name that answers, and what it answers with.

    stack: the server's, for a name that shares batches; `loaded.model` is the bare base then, and `adapter` names what
    the stack adds (None: nothing). Without a stack `loaded.model` is the whole model. n_prefix: columns of its prefix.
    """

    served: Served
    loaded: LoadedRun
    stack: Stack | None = None
    adapter: str | None = None
    n_prefix: int = 0


def open_models(runs: Sequence[Run], device: str) -> dict[str, Model]:
    """Every run and, where its weights are its own, the bare base; the base's weights lie in memory once.

    Raises: what load_run and Stack.add raise. Needs memory for two copies of the base while a run loads that stands on
    a model of its own.
    """
    if stands_alone(runs[0]):
        loaded = load_run(runs[0].path, device)
        return {runs[0].name: _model(runs[0].name, loaded, _stack(loaded))}
    base = load_run(runs[0].path, device, with_adapter=False)
    stack = _stack(base)
    models = {BASE: _model(BASE, base, stack)}
    for run in runs:
        if stack is not None and _join(stack, run):
            models[run.name] = _model(run.name, _beside(base, run), stack, run.name)
        else:
            models[run.name] = _model(run.name, load_run(run.path, device))
            share_weights(base.model, models[run.name].loaded.model)
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


def _stack(base: LoadedRun) -> Stack | None:
    """A stack on this base, or None where its rows cannot share batches."""
    stack = Stack(base.model, base_hash=base.base.hash)
    why = unfit(stack)
    if why is not None:
        _log.warning("%s answers one request at a time: %s", base.base.source, why)
        return None
    return stack


def _join(stack: Stack, run: Run) -> bool:
    """Take a run's adapter into the stack; False where no stack can hold it. Raises AdapterError for a bad one."""
    try:
        stack.add(run.name, run.adapter())
    except AdapterError as error:
        if ALONE not in str(error):
            raise
        _log.warning("%s answers on a model of its own: %s", run.name, error)
        return False
    return True


def _beside(base: LoadedRun, run: Run) -> LoadedRun:
    """A run on a base that is open already: what is its own beside its adapter."""
    facts = run.finished("base")
    try:
        template = (run.path / "template.jinja").read_text(encoding="utf-8")
        sampling = dict(json.loads((run.path / "generation.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as broken:
        raise RunError(f"{run.path}: it is damaged ({broken}). Copy the whole run folder again.") from broken
    renderer = Renderer(base.base.tokenizer, template)
    ends, labels = frozenset(renderer.stop_ids), tuple(facts.get("labels", ()))
    return replace(base, run=run, facts=facts, renderer=renderer, sampling=sampling, ends=ends, labels=labels)


def _model(name: str, loaded: LoadedRun, stack: Stack | None = None, adapter: str | None = None) -> Model:
    run, is_base = loaded.run, name == BASE
    n_prefix = open_model(loaded.model).n_prefix
    if stack is not None and adapter is not None:
        n_prefix = stack.n_prefix(stack.owners([adapter]))[0]
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    served = Served(
        name=name,
        adapter=None if is_base else run.name,
        base=loaded.base.source if is_base or not stands_alone(run) else run.name,
        base_hash=loaded.base.hash,
        weights_hash=loaded.base.hash if is_base or stands_alone(run) else _adapter_hash(run.adapter()),
        context=loaded.base.context - n_prefix,
        task="chat" if is_base else str(loaded.facts.get("task", "chat")),
        defaults=loaded.sampling,
        created=int((run.path / RUN_FILE).stat().st_mtime),
    )
    return Model(served, loaded, stack, adapter, n_prefix)


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
