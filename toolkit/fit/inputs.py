"""What a run was started with, so that the same command can tell whether anything changed since."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from toolkit.bases.fetch import find_folder
from toolkit.bases.files import hash_files, weight_files
from toolkit.bundle import Run
from toolkit.disk import hash_file, stamp
from toolkit.errors import RunError
from toolkit.recipe.model import Base, Recipe
from toolkit.shipped import resolve

TESTED = ("maltu", "torch", "transformers", "trl", "peft", "datasets", "tokenizers")


def inputs_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe by dotted key, and SHA-256 of every local data file and of the base's files; fetches a hub base."""
    data = recipe.data
    held = [name for part in (data.valid, data.test) if not isinstance(part, float | int) for name in part]
    named = [*data.train_files, *held, *([recipe.evaluate.prompts] if recipe.evaluate.prompts else [])]
    return {
        "recipe": flat(recipe.model_dump(mode="json")),
        "data": {name: name if name.startswith("hub:") else hash_file(resolve(name)) for name in named},
        "base": _hash_base(recipe.base) if isinstance(recipe.base, Base) else "new",
    }


def _hash_base(base: Base) -> str:
    folder = find_folder(base, weights=True)
    return hash_files(folder, weight_files(folder, base.model))


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested maps as dotted keys; lists stay whole."""
    if not isinstance(value, Mapping):
        return {key: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found.update(flat(inner, f"{key}.{name}" if key else str(name)))
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, a line each: recipe keys with both values, data files and the base by name."""
    lines = []
    for key in sorted({*before["recipe"], *now["recipe"]}):
        old, new = before["recipe"].get(key), now["recipe"].get(key)
        if old != new:
            lines.append(f"{key}: {old} became {new}")
    lines += [f"{name}: the file changed" for name in now["data"] if before["data"].get(name) != now["data"][name]]
    if before["base"] != now["base"]:
        lines.append("base: its files changed")
    return lines


def refuse_changed(run: Run, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise RunError with everything that changed since the run was started, and the two ways on."""
    found = changes(before, now)
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise RunError(
            f"{run.path}: this run was started with something else:\n{listed}\nTrain beside it with name={run.name}-2,"
            f" or start anew with --fresh (the old folder moves to {run.path.parent / '.old'})."
        )


def surroundings() -> dict[str, Any]:
    """Machine, versions and threads: with the same ones a run that goes on ends with the same bits."""
    return {
        "started": stamp(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {name: version_of(name) for name in TESTED},
    }


def version_of(name: str) -> str:
    """The version of an installed package; unknown for one that is run from a folder."""
    try:
        return version(name)
    except Exception:  # not installed as a package: run from a folder
        return "unknown"
