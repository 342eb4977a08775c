"""The models of one server: its runs on one base, whose weights lie in memory once.

What a stack can hold is one adapter more in the server's stack; every other run (DoRA, most of PEFT's kinds) is opened
as a model of its own, its base's weights shared where they are equal. A run of several adapters answers as RUN/EXPERT
for each of them, and under its own name as its combination, where it has one.
"""

import functools
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from serve.engines.contract import Served
from serve.engines.slots import unfit
from serve.names import BASE
from serve.runs import stands_alone
from toolkit.adapters import anatomy
from toolkit.adapters.opened import open_model
from toolkit.bundle import RUN_FILE, Run
from toolkit.combine.gate import Gate
from toolkit.combine.route import Router
from toolkit.combine.speaker import GATE, MAIN, ROUTER, Spec, spec_of
from toolkit.corpus.render import Renderer
from toolkit.disk import hash_file, hash_text
from toolkit.errors import AloneError, RunError
from toolkit.loaded import LoadedRun, load_run, rendering_of
from toolkit.stack.stack import Ready, Stack

_log = logging.getLogger("maltu.serve.models")
KEEP_MB = 512  # of adapters' weights in float32, gathered for batches that come again


@dataclass(frozen=True)
class Model:
    """A name that answers, and what it answers with.

    stack: the server's, for a name that shares batches; `loaded.model` is the bare base then, and `adapter` names what
    the stack adds (None: nothing). Without a stack `loaded.model` is the whole model. n_prefix: columns of its prefix.
    spec: how several adapters of a run answer together, named in `served.members`; with its gate or its router.
    """

    served: Served
    loaded: LoadedRun
    stack: Stack | None = None
    adapter: str | None = None
    n_prefix: int = 0
    spec: Spec | None = None
    gate: Gate | None = None
    router: Router | None = None

    @functools.cached_property
    def hashes(self) -> tuple[str, ...]:
        """What tells its keys and values from those of any other model: base, adapter, gate and template."""
        adapter = "" if self.stack is None or self.adapter is None else self.stack.hash(self.adapter)
        gate = "" if self.gate is None else self.served.weights_hash
        return self.served.base_hash, adapter, gate, self.loaded.renderer.template

    @property
    def n_vocabulary(self) -> int:
        """Token ids lie below it."""
        return int(anatomy.text_config(self.loaded.base.model).vocab_size)


def open_models(runs: Sequence[Run], device: str, adapters_in: torch.dtype = torch.float32) -> dict[str, Model]:
    """Every run and, where its weights are its own, the bare base; the base's weights lie in memory once. adapters_in:
    the type of the stack's weights and arithmetic.

    Raises: what load_run and Stack.add raise. Needs memory for two copies of the base while a run loads that stands on
    a model of its own.
    """
    if stands_alone(runs[0]):
        loaded = load_run(runs[0].path, device)
        return {runs[0].name: _model(runs[0].name, loaded, _stack(loaded, adapters_in))}
    base = load_run(runs[0].path, device, with_adapter=False)
    stack = _stack(base, adapters_in)
    models = {BASE: _model(BASE, base, stack)}
    for run in runs:
        models |= open_parts(base, stack, read_run(base, stack, run), device)
    return models


@dataclass(frozen=True)
class Parts:
    """A run as read from its folder for a base and a stack that are open already: nothing of them has changed yet.

    adapters: each with its place in the run; None where no stack holds it. hashes: what tells their weights apart.
    """

    run: Run
    beside: LoadedRun
    spec: Spec | None
    adapters: Mapping[str, Ready | None]
    hashes: Mapping[str, str]
    gate: Gate | None
    router: Router | None
    combined: str


def read_run(base: LoadedRun, stack: Stack | None, run: Run) -> Parts:
    """All of a run's files, which takes the time of several steps; another thread may be at work with base and stack.

    Raises: what Stack.read raises; RunError, AdapterError for files of the run that are missing or damaged.
    """
    beside = _beside(base, run)
    spec = spec_of(run, beside.facts)
    adapters = {adapter: _ready(stack, _called(run, adapter), run.adapter(adapter)) for adapter in run.adapters()}
    hashes = {adapter: adapter_hash(run.adapter(adapter)) for adapter in run.adapters()}
    gate = Gate.load(run.path / GATE) if spec is not None and spec.kind == "gate" else None
    router = Router.load(run.path / ROUTER, base.base.hash) if spec is not None and spec.kind == "route" else None
    own = [hash_file(path) for folder in (ROUTER, GATE) for path in sorted((run.path / folder).glob("*"))]
    combined = "" if spec is None else "\n".join([spec.how, *own])
    return Parts(run, beside, spec, adapters, hashes, gate, router, combined)


def open_parts(
    base: LoadedRun, stack: Stack | None, parts: Parts, device: str, *, may_be_alone: bool = True
) -> dict[str, Model]:
    """The names of one more run, on a base that is open already; after an error the stack is as it was.

    In the stack its adapters are called as here, or otherwise where an older version has those names. may_be_alone:
    what no stack holds gets a model of its own; else it is refused. Raises: what load_run, Stack.add and Gate.check
    raise; RunError for a combination with members on other bases.
    """
    run, models = parts.run, dict[str, Model]()
    before = set(stack.slots) if stack is not None else set()
    try:
        for adapter, ready in parts.adapters.items():
            name = _called(run, adapter)
            if stack is not None and ready is not None:
                inside = _free(stack, name)
                stack.add(inside, ready)
                models[name] = _model(name, parts.beside, stack, inside, parts.hashes[adapter])
            elif not may_be_alone:
                raise RunError(
                    f"{name}: no stack holds it, and a model of its own is loaded only when a server starts."
                )
            else:
                lone = load_run(run.path, device, adapter)
                models[name] = _model(name, lone, weights_hash=parts.hashes[adapter])
                share_weights(base.model, lone.model)
        if parts.spec is not None and run.name not in models:
            models = {run.name: _combined(parts, parts.spec, stack, models)} | models
    except BaseException:
        if stack is not None:
            for name in set(stack.slots) - before:
                stack.remove(name)
        raise
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


def _stack(base: LoadedRun, dtype: torch.dtype) -> Stack | None:
    """A stack on this base, or None where its rows cannot share batches."""
    stack = Stack(base.model, base_hash=base.base.hash, dtype=dtype, keep_mb=KEEP_MB * dtype.itemsize // 4)
    why = unfit(stack)
    if why is not None:
        _log.warning("%s answers one request at a time: %s", base.base.source, why)
        return None
    return stack


def _free(stack: Stack, name: str) -> str:
    """A name that no adapter of the stack has."""
    return next(one for n in itertools.count(1) if (one := name if n == 1 else f"{name} ({n})") not in stack.slots)


def _called(run: Run, adapter: str) -> str:
    return run.name if adapter == MAIN else f"{run.name}/{adapter}"


def _ready(stack: Stack | None, name: str, folder: Path) -> Ready | None:
    """An adapter as the stack takes it; None where no stack can hold it. Raises AdapterError for a bad one."""
    try:
        return None if stack is None else stack.read(name, folder)
    except AloneError as error:
        _log.warning("%s answers on a model of its own: %s", name, error)
        return None


def _combined(parts: Parts, spec: Spec, stack: Stack | None, models: Mapping[str, Model]) -> Model:
    """A run's adapters as one model. Raises: RunError where they do not all stand on this base, or share no batch."""
    run, beside = parts.run, parts.beside
    lacking = [name for name in spec.members if f"{run.name}/{name}" not in models]
    if lacking:
        raise RunError(
            f"{run.path}: {', '.join(lacking)} of its members stand on bases of their own, which no other run shares."
            f" Serve it by itself: python -m serve {run.path}"
        )
    members = [models[f"{run.name}/{name}"] for name in spec.members]
    apart = [model.served.name for model in members if model.stack is None]
    if spec.kind != "route" and (stack is None or apart):
        who = ", ".join(apart) or "its members"
        raise RunError(
            f"{run.path}: {who} run on models of their own here, which share no batch. Serve them one by one."
        )
    gate = None if parts.gate is None or stack is None else _own_gate(parts.gate, run, stack, models)
    weights = [spec.weights.get(name, 0.0) for name in spec.members]
    told = describe(run.name, spec.kind, [model.served for model in members], weights, parts.combined)
    served = replace(
        told,
        members=told.members if spec.weights else (),
        defaults=beside.sampling,
        task=str(beside.facts.get("task", "chat")),
        created=int((run.path / RUN_FILE).stat().st_mtime),
    )
    return Model(served, beside, stack, spec=spec, gate=gate, router=parts.router)


def _own_gate(gate: Gate, run: Run, stack: Stack, models: Mapping[str, Model]) -> Gate:
    """A run's gate, over its adapters as they are called in the stack."""
    inside = {name: models[f"{run.name}/{name}"].adapter or "" for name in (*gate.experts, *gate.hashes)}
    experts = tuple(inside[name] for name in gate.experts)
    named = replace(gate, experts=experts, hashes={inside[name]: known for name, known in gate.hashes.items()})
    named.check(stack)
    return named


def describe(name: str, kind: str, members: Sequence[Served], weights: Sequence[float], how: str) -> Served:
    """Several models described as one: what they have in common, and a hash of everything that decides an answer."""
    first = members[0]
    hashed = [kind, how, [[one.weights_hash, weight] for one, weight in zip(members, weights, strict=True)]]
    same = [key for key, value in first.defaults.items() if all(one.defaults.get(key) == value for one in members)]
    return Served(
        name=name,
        adapter=None,
        base=first.base,
        base_hash=first.base_hash,
        weights_hash=hash_text(json.dumps(hashed)),
        context=min(one.context for one in members),
        task="chat",
        defaults={key: first.defaults[key] for key in same},
        created=max(one.created for one in members),
        combination=kind,
        members=tuple(zip((one.name for one in members), weights, strict=True)),
    )


def _beside(base: LoadedRun, run: Run) -> LoadedRun:
    """A run on a base that is open already: what is its own beside its adapter."""
    facts = run.finished("base")
    template, sampling = rendering_of(run)
    renderer = Renderer(base.base.tokenizer, template)
    ends, labels = frozenset(renderer.stop_ids), tuple(facts.get("labels", ()))
    return replace(base, run=run, facts=facts, renderer=renderer, sampling=sampling, ends=ends, labels=labels)


def _model(
    name: str,
    loaded: LoadedRun,
    stack: Stack | None = None,
    adapter: str | None = None,
    weights_hash: str = "",
) -> Model:
    """weights_hash: of its adapter; none for a base and for a run whose every weight was trained."""
    run, is_base = loaded.run, name == BASE
    n_prefix = open_model(loaded.model).n_prefix
    if stack is not None and adapter is not None:
        n_prefix = stack.n_prefix(stack.owners([adapter]))[0]
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    served = Served(
        name=name,
        adapter=None if is_base else name,
        base=loaded.base.source if is_base or not stands_alone(run) else run.name,
        base_hash=loaded.base.hash,
        weights_hash=weights_hash or loaded.base.hash,
        context=loaded.base.context - n_prefix,
        task="chat" if is_base else str(loaded.facts.get("task", "chat")),
        defaults=loaded.sampling,
        created=int((run.path / RUN_FILE).stat().st_mtime),
    )
    return Model(served, loaded, stack, adapter, n_prefix)


def adapter_hash(folder: Path) -> str:
    """What tells the weights in an adapter's folder from any others."""
    return hash_text("\n".join(f"{path.name} {hash_file(path)}" for path in _weight_files(folder)))


def _weight_files(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.safetensors"))


def _plain_name(name: str) -> str:
    """A parameter's name without what PEFT puts around a layer."""
    return name.removeprefix("base_model.model.").removeprefix("base_model.").replace(".base_layer.", ".")


def _is_equal(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same and one.dtype.is_floating_point and torch.equal(one, other)
