"""A run opened for use: its base, its adapter on it, and the renderer it was trained with.

The door of chat, evaluate, export and the server: they know a run by its folder alone and never see how it was trained.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit.adapters.kinds import kind_in_folder
from toolkit.bases.encoder import LoadedEncoder, load_encoder
from toolkit.bases.load import LoadedBase, load_base
from toolkit.bundle import Run, open_run
from toolkit.corpus.render import Renderer
from toolkit.errors import BaseError, RunError
from toolkit.quiet import quiet
from toolkit.recipe.model import Base

FROM_SCRATCH = "new"  # how run.json calls a base that the run made itself
ENCODER = "encoder"  # what run.json calls the kind of a base that labels texts
WHOLE_MODEL = "model"  # where a run keeps its weights when every parameter was trained


@dataclass(frozen=True)
class LoadedRun:
    """A run ready to answer. `model` is base and adapter, in eval mode; `sampling` are the run's own defaults for it.

    ends: token ids that end an answer. facts: run.json. labels: the words a classifier chooses from, else empty.
    """

    run: Run
    facts: dict[str, Any]
    base: LoadedBase
    model: nn.Module
    renderer: Renderer
    sampling: dict[str, Any]
    ends: frozenset[int]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class LoadedLabeller:
    """A run of an encoder, ready to label texts. `model` is encoder, head and adapter, in eval mode; its outputs stand
    in the order of `labels`. facts: run.json.
    """

    run: Run
    facts: dict[str, Any]
    base: LoadedEncoder
    model: nn.Module
    labels: tuple[str, ...]


def pick_device(asked: str = "auto") -> torch.device:
    """The device a word means: auto is a GPU where there is one. Raises BaseError for one that is not there."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as absent:
        raise BaseError(
            f"device {asked}: not usable here ({str(absent).splitlines()[0]}). Take cpu, or auto."
        ) from None
    return device


def load_run(path: Path | str, device: str = "auto", adapter: str = "main", *, with_adapter: bool = True) -> LoadedRun:
    """Open a finished run. `with_adapter=False` gives the bare base, with the run's template.

    Raises: RunError when the folder is no finished run, its base labels texts and cannot talk (`load_labeller` opens
    it), or its bare base is asked for and it was made from scratch; BaseError when its base cannot be loaded or is
    another one by now; AdapterError when the adapter does not fit.
    """
    run = open_run(path)
    facts = run.finished("base")
    if is_labeller(facts):
        raise RunError(
            f"{run.path}: its base is an encoder ({facts['base']['model']}): it labels texts; it cannot talk. `python"
            " -m toolkit evaluate` measures it, and it can vote with other runs."
        )
    template, sampling = rendering_of(run)
    place = pick_device(device)
    _refuse_several(run, facts, adapter, with_adapter)
    with quiet():
        is_whole = with_adapter and (run.path / WHOLE_MODEL).is_dir()
        named = Base(model=str(run.path / WHOLE_MODEL)) if is_whole else base_of(run, facts)
        base = replace(load_base(named, place, _dtype(place)), source=facts["base"]["model"])
        model: nn.Module = base.model
        if not is_whole:
            _check_same(base, facts, run)
            if with_adapter:
                folder = run.adapter(adapter)
                model = kind_in_folder(folder).load(model, folder, base_hash=base.hash)
    renderer = Renderer(base.tokenizer, template)
    labels = tuple(facts.get("labels", ()))
    return LoadedRun(run, facts, base, model.eval(), renderer, sampling, frozenset(renderer.stop_ids), labels)


def _refuse_several(run: Run, facts: dict[str, Any], adapter: str, with_adapter: bool) -> None:
    """A run that answers with several adapters has none that answers for it."""
    found = facts.get("combination")
    if found is None or not with_adapter or adapter in run.adapters():
        return
    members = ", ".join(map(str, found.get("members") or run.adapters()))
    raise RunError(
        f"{run.path}: several adapters answer together ({found.get('kind')} of {members}), so there is no single model"
        f" to open. Chat with the run or serve it as it is; or name one (--adapter {', '.join(run.adapters())}); a"
        f" member on a base of its own is a run in {run.path / 'experts'}."
    )


def is_labeller(facts: Mapping[str, Any]) -> bool:
    """Whether run.json is that of a run whose base is an encoder."""
    return isinstance(facts.get("base"), dict) and facts["base"].get("kind") == ENCODER


def load_labeller(path: Path | str, device: str = "auto") -> LoadedLabeller:
    """Open a finished run whose base is an encoder.

    Raises: RunError when the folder is none; BaseError when its base cannot be loaded or is another one by now;
    AdapterError when the adapter does not fit.
    """
    run = open_run(path)
    facts = run.finished("base")
    labels = tuple(facts.get("labels") or ())
    if not is_labeller(facts) or len(labels) < 2:
        raise RunError(f"{run.path}: not a run of an encoder with labels. Open it as one that talks.")
    place = pick_device(device)
    folder = run.adapter()
    with quiet():
        base = load_encoder(base_of(run, facts), labels, place, _dtype(place), seed=0)
        base = replace(base, source=facts["base"]["model"])
        _check_same(base, facts, run)
        model = kind_in_folder(folder).load(base.model, folder, base_hash=base.hash)
    return LoadedLabeller(run, facts, base, model.eval(), labels)


def base_of(run: Run, facts: dict[str, Any]) -> Base:
    """The base a run was trained on, as a recipe would name it: where it lay then, or else by its name.

    Raises: RunError for a run whose base was made from scratch, and is not there without the training.
    """
    named = facts["base"]
    folder = named.get("folder")
    if named["model"] == FROM_SCRATCH:
        raise RunError(f"{run.path}: its base was made from scratch, so there is no bare base to open.")
    model = named["model"]
    keys: tuple[str, ...] = ("revision", "quantize", "trust_remote_code")
    if folder is not None and Path(folder).is_dir():
        model = folder  # not what a relative path means from another working directory
        keys = keys[1:]  # a folder has no revisions
    return Base(model=model, **{key: named[key] for key in keys if key in named})


def rendering_of(run: Run) -> tuple[str, dict[str, Any]]:
    """A run's template, and its own defaults for sampling. Raises RunError where a file of theirs is damaged."""
    return _read(run, "template.jinja"), _sampling(run)


def _read(run: Run, name: str) -> str:
    try:
        return (run.path / name).read_text(encoding="utf-8")
    except (OSError, ValueError) as broken:
        raise RunError(f"{run.path / name}: cannot be read ({broken}). Copy the whole run folder again.") from broken


def _sampling(run: Run) -> dict[str, Any]:
    text = _read(run, "generation.json")
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as broken:
        raise RunError(
            f"{run.path}: its generation.json is damaged ({broken}). Copy the whole run folder again."
        ) from broken


def _check_same(base: LoadedBase | LoadedEncoder, facts: dict[str, Any], run: Run) -> None:
    if base.hash != facts["base"]["hash"]:
        raise BaseError(
            f"{facts['base']['model']}: not the base that {run.path} was trained on (its files differ). Bring that base"
            " back, or name its revision; an adapter answers nonsense on another one."
        )


def _dtype(device: torch.device) -> torch.dtype:
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32
