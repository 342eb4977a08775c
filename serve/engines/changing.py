"""Runs that come and go while a server answers: which models there are afterwards, and what has to go out of the stack.

A reloaded run stands in the stack beside its old version, under another name, until nobody is answered by that any
more. A run's files are read, checked and hashed beside the steps; what stands between two of them is putting its
weights into the stack. A run that needs a model of its own would hold everybody up while its base loads, so it is
refused.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from serve.engines.models import Model, Parts, open_parts, read_run
from serve.names import BASE, is_of, refuse_name
from serve.refusal import Refusal
from serve.runs import stands_alone
from toolkit.bundle import Run
from toolkit.combine.speaker import MAIN
from toolkit.errors import AdapterError, BaseError, DataError, RunError
from toolkit.stack.adapter import Adapter
from toolkit.stack.lora import PART, PREFIX


@dataclass(frozen=True)
class Changed:
    """The models from now on, and the adapters of the stack that none of them uses."""

    models: dict[str, Model]
    gone: tuple[str, ...]


def read(models: Mapping[str, Model], run: Run) -> Parts:
    """A run's files, for the server's base; beside the steps. Raises Refusal: 400 run_unfit with the reason."""
    base = models.get(BASE)
    if base is None or base.stack is None:
        raise _unfit("this server's base answers one request at a time, so no run joins it. Start another server.")
    if wrong := refuse_name(run.name):
        raise _unfit(wrong)
    with _refusing():
        _check(run, base)
        parts = read_run(base.loaded, base.stack, run)
    idle = [name for name, ready in parts.adapters.items() if ready is not None and not has_effect(ready.adapter)]
    if idle:
        who = ", ".join(run.name if name == MAIN else f"{run.name}/{name}" for name in idle)
        raise _unfit(f"{who} changes nothing: its weights are as they began. Train it longer.")
    return parts


def changed(models: Mapping[str, Model], add: Parts | None, remove: str | None) -> Changed:
    """See Engine.change; after a Refusal the stack is as it was."""
    if remove is not None and (remove == BASE or remove not in models or "/" in remove):
        raise Refusal(404, f"{remove[:80]!r} is no run that is loaded.", "model_not_found", "run")
    kept = {name: model for name, model in models.items() if not is_of(name, remove)}
    own = {} if add is None else _opened(models, kept, add)
    leaving = {name for model in (models[name] for name in models.keys() - kept.keys()) for name in adapters_of(model)}
    staying = {name for model in [*kept.values(), *own.values()] for name in adapters_of(model)}
    return Changed(kept | own, tuple(sorted(leaving - staying)))


def adapters_of(model: Model) -> tuple[str, ...]:
    """The names in the stack that a model needs there."""
    gated = model.gate.experts if model.gate is not None else ()
    return (*gated, *([model.adapter] if model.stack is not None and model.adapter is not None else []))


def has_effect(adapter: Adapter) -> bool:
    """Whether an adapter changes what the base computes, whatever the input."""
    tensors = adapter.tensors
    if adapter.kind == "lora":
        halves: dict[str, list[bool]] = {}
        for name, tensor in tensors.items():
            found = PART.match(name.removeprefix(PREFIX))
            halves.setdefault(found["module"] if found else name, []).append(bool(tensor.any()))
        return any(all(parts) for parts in halves.values())
    if adapter.kind == "reft":
        edits = {name.rpartition(".")[0] for name in tensors}
        return any(
            not torch.equal(tensors[f"{edit}.weight"], tensors[f"{edit}.rotation"]) or tensors[f"{edit}.bias"].any()
            for edit in edits
        )
    return adapter.kind != "embedding" or bool(tensors["delta"].any())


def _opened(models: Mapping[str, Model], kept: Mapping[str, Model], parts: Parts) -> dict[str, Model]:
    """A run's models, opened on the server's base. Raises Refusal: 400 run_unfit with the reason."""
    base, name = models[BASE], parts.run.name
    if name in kept:
        raise Refusal(409, f"{name} is loaded already. Reload it instead.", "loaded_already", "run")
    with _refusing():
        return open_parts(base.loaded, base.stack, parts, str(base.loaded.base.device), may_be_alone=False)


@contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong with a run, as its refusal."""
    try:
        yield
    except (AdapterError, BaseError, DataError, RunError) as error:
        raise _unfit(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        raise _unfit(f"it does not fit into memory ({str(error).splitlines()[0][:200]}).") from None


def _check(run: Run, base: Model) -> None:
    """Refuse what can be told without reading weights. Raises RunError."""
    facts = run.finished("base")["base"]
    if stands_alone(run):
        raise RunError(f"{run.name}: every weight was trained, so it shares no base with others. Serve it by itself.")
    if facts["hash"] != base.served.base_hash:
        raise RunError(
            f"{run.name} stands on another base ({facts['model']}, {facts['hash'][:12]}) than this server "
            f"({base.served.base}, {base.served.base_hash[:12]}). Serve it by itself."
        )
    limit = sum(tensor.nbytes for tensor in base.loaded.model.parameters())
    for name in run.adapters():
        if (size := _size_of(run.adapter(name))) > limit:
            raise RunError(
                f"{run.name}: {name} has {size:,} bytes, more than its base ({limit:,}). That is no adapter."
            )


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _unfit(reason: str) -> Refusal:
    return Refusal(400, reason, "run_unfit", "run")
