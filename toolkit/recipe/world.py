"""What a recipe needs from this machine: files that exist, packages that are installed. Nothing heavy is opened."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from toolkit.recipe.adapter import Lora, PeftKind
from toolkit.recipe.combine import Route
from toolkit.recipe.experts import names_files, trained
from toolkit.recipe.explain import shown
from toolkit.recipe.model import Base, Recipe, WeightedFile
from toolkit.recipe.nearest import did_you_mean, nearest_file
from toolkit.recipe.sense import Clash
from toolkit.recipe.sense_experts import moved, sound
from toolkit.recipe.track import tracker_name
from toolkit.recipe.tree import Key, dotted
from toolkit.shipped import PREFIX, resolve, shipped

HUB = re.compile(r"hub:[\w.-]+(/[\w.-]+)?(:[^:\s]*){0,2}")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
PATH_SIGNS = ("./", "../", "/", "~", ".\\", "..\\")


def lacks(recipe: Recipe, finished: Path | None = None) -> Iterator[Clash]:
    """What the recipe names and this machine lacks; files that would be learned and be the judge of it. A run that is
    finished holds what it took over from other runs: those may be gone.
    """
    yield from _packages(recipe)
    yield from _base(recipe)
    yield from _storage(recipe)
    yield from _of_experts(recipe, finished)
    lists = [*_file_lists(recipe), *_file_lists_of_experts(recipe)]
    for at, name in lists:
        yield from _file(at, name)
    yield from _shared(recipe, lists)
    if recipe.evaluate.prompts is not None:
        yield from _file(("evaluate", "prompts"), recipe.evaluate.prompts)


def _packages(recipe: Recipe) -> Iterator[Clash]:
    if isinstance(recipe.base, Base) and recipe.base.quantize == "nf4" and find_spec("bitsandbytes") is None:
        says = "nf4 needs bitsandbytes. Run pip install 'maltu[gpu]', or write quantize: none"
        yield Clash("base.quantize", says)
    for at, module, package in _of_search(recipe):
        if find_spec(module) is None:
            yield Clash(at, f"needs {package}, which is not installed. Run pip install '{package}'")
    if isinstance(recipe.combine, Route) and recipe.combine.router == "embedding":
        if find_spec("sentence_transformers") is None:
            says = "needs sentence-transformers, which is not installed. Run pip install sentence-transformers"
            yield Clash("combine.router", f"{says}, or choose router: classifier")
        encoder = recipe.combine.encoder
        if encoder and encoder.startswith(PATH_SIGNS) and not os.path.isdir(os.path.expanduser(encoder)):
            yield Clash("combine.encoder", f"there is no folder {shown(encoder)}. Name a model's folder, or a hub id")
    for index, tracker in enumerate(map(tracker_name, recipe.track)):
        if find_spec(tracker) is None:
            package = "'maltu[trackio]'" if tracker == "trackio" else tracker
            says = f"{tracker} is not installed. Run pip install {package}, or leave it out"
            yield Clash(f"track.{index}", says)


def _of_search(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Modules that a search needs: the key to change, the module, its package."""
    search = recipe.search
    if search is None:
        return
    for sampler, module in (("gp", "scipy"), ("qmc", "scipy"), ("cmaes", "cmaes")):
        if search.sampler == sampler:
            yield "search.sampler", module, module
    if search.storage is not None:
        yield "search.storage", "sqlalchemy", "sqlalchemy"
        if search.storage.startswith("postgresql"):
            yield "search.storage", "psycopg", "psycopg[binary]"


def _storage(recipe: Recipe) -> Iterator[Clash]:
    url = recipe.search.storage if recipe.search else None
    if url is None or not url.startswith("sqlite:///"):
        return
    folder = Path(url.removeprefix("sqlite:///").partition("?")[0]).parent
    if not os.path.isdir(folder):
        yield Clash("search.storage", f"there is no folder {shown(str(folder))} for this file. Make it first")


def folder_of(model: str) -> Path | None:
    """The folder that `base.model` names, or None when it is a catalogue name or a hub id."""
    folder = Path(os.path.expanduser(model))
    return folder if model.startswith(PATH_SIGNS) or folder.is_absolute() or os.path.exists(folder) else None


def _base(recipe: Recipe) -> Iterator[Clash]:
    base = recipe.base
    if not isinstance(base, Base):
        return
    folder = folder_of(base.model)
    if folder is None:
        yield from _base_name(base.model)
    elif not os.path.exists(folder):
        yield Clash("base.model", f"there is no folder {shown(base.model)}{did_you_mean(nearest_file(folder))}")
    elif not os.path.isdir(folder):
        yield Clash("base.model", f"'{base.model}' is a file. Name the folder that holds config.json and the weights")
    elif not os.path.isfile(folder / "config.json"):
        yield Clash("base.model", f"'{base.model}' holds no config.json, so it is no model. Name a model's folder")
    if folder is not None and base.revision is not None:
        yield Clash("base.revision", "a folder has no revisions. Remove it, or name a hub id", ("base.model",))
    if _is_tied(shipped("base/spoken-mini") if base.model == "spoken-mini" else folder):
        yield from _on_tied(recipe)


def _base_name(model: str) -> Iterator[Clash]:
    if "huggingface.co/" in model:
        name = "/".join(model.split("huggingface.co/")[1].split("/")[:2])
        yield Clash("base.model", f"is a web address. Write the hub id: {name}")
    elif model.startswith(PREFIX):
        yield Clash("base.model", "a shipped base is named by its catalogue name, as in spoken-mini")
    elif not HUB_ID.fullmatch(model):
        yield Clash("base.model", f"{shown(model)} is no catalogue name, no hub id (owner/name) and no folder here")


def _is_tied(folder: Path | None) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes()) if folder else {}
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("tie_word_embeddings") is True


def _on_tied(recipe: Recipe) -> Iterator[Clash]:
    adapter, needs = recipe.adapter, ("base.model", "adapter.kind")
    says = "this base ties its head to its embeddings, so an adapter on them would change both. Use kind: embedding"
    if isinstance(adapter, Lora) and "embed_tokens" in adapter.targets:
        yield Clash("adapter.targets", says, needs)
    if isinstance(adapter, PeftKind) and adapter.options.get("trainable_token_indices") is not None:
        yield Clash("adapter.options.trainable_token_indices", says, needs)


def _of_experts(recipe: Recipe, finished: Path | None) -> Iterator[Clash]:
    """Runs that are not there, and what the bases and adapters of experts lack."""
    seen: dict[str, str] = {}
    for name, own in (recipe.experts or {}).items():
        if isinstance(own.get("run"), str) and own["run"]:
            place, folder = ("experts", name, "run"), os.path.expanduser(own["run"])
            first = seen.setdefault(os.path.realpath(folder), name)
            if finished is not None and not os.path.isfile(os.path.join(folder, "run.json")):
                continue
            if not os.path.isdir(folder):
                guess = did_you_mean(nearest_file(Path(folder)))
                yield Clash(place, f"there is no run {shown(own['run'])}{guess or f' in {Path.cwd()}'}")
            elif not os.path.isfile(os.path.join(folder, "run.json")):
                yield Clash(place, f"'{own['run']}' holds no run.json, so it is no run. Name a run's folder")
            elif first != name:
                yield Clash(place, f"is the run of {first} too. Name it once")
    before = {one.at for one in (*_packages(recipe), *_base(recipe))}
    for name, made in sound(recipe).items():
        for one in (*_packages(made), *_base(made)):
            if one.at not in before:
                yield moved(name, (recipe.experts or {})[name], one)


def _file_lists(recipe: Recipe) -> list[tuple[Key, str]]:
    data = recipe.data
    lists = _numbered(("data", "train"), data.train) if _learns(recipe) else []
    for split, names in (("valid", data.valid), ("test", data.test)):
        if isinstance(names, tuple):
            lists += _numbered(("data", split), names)
    return lists


def _learns(recipe: Recipe) -> bool:
    """Whether the files of the recipe itself are read: not where every expert names its own."""
    own = [own for _, own in trained(recipe)]
    return not own or not all(names_files(one) for one in own)


def _file_lists_of_experts(recipe: Recipe) -> list[tuple[Key, str]]:
    made = sound(recipe)
    own = [name for name, one in trained(recipe) if name in made and names_files(one)]
    return [pair for name in own for pair in _numbered(("experts", name, "data", "train"), made[name].data.train)]


def _numbered(place: Key, files: Sequence[str | WeightedFile]) -> list[tuple[Key, str]]:
    return [
        ((*place, index), one) if isinstance(one, str) else ((*place, index, "path"), one.path)
        for index, one in enumerate(files)
    ]


def _file(at: Key, name: str) -> Iterator[Clash]:
    if name.startswith("hub:"):
        if not HUB.fullmatch(name):
            yield Clash(at, f"'{name}' is not hub:NAME[:config][:split], as in hub:owner/name:default:train")
        return
    path = resolve(name)  # asked by os.path: pathlib raises OSError for a name that is too long
    if os.path.isfile(path):
        if not os.access(path, os.R_OK):
            yield Clash(at, f"'{name}' may not be read. Change its permissions")
    elif os.path.isdir(path):
        yield Clash(at, f"'{name}' is a folder. List its files")
    elif name.startswith(("http://", "https://")):
        yield Clash(at, f"'{name}' is a web address. Fetch the file first, or write hub:NAME")
    else:
        yield Clash(at, f"there is no file {shown(name)}{_where_else(name, path)}")


def _where_else(name: str, path: Path) -> str:
    for folder in ("talk", "speech", ""):
        own = f"{folder}/{path.name}".lstrip("/")
        if not name.startswith(PREFIX) and os.path.isfile(shipped(own)):
            return did_you_mean(PREFIX + own)
    if any(sign in name for sign in "*?[") or name.startswith("~"):
        return ". Patterns and ~ are not filled in: write the whole path of each file"
    near = nearest_file(path)
    if near and name.startswith(PREFIX):
        near = name[: len(name) - len(path.name)] + Path(near).name
    return did_you_mean(near) if near else f" in {Path.cwd()}" if not path.is_absolute() else ""


def _shared(recipe: Recipe, lists: list[tuple[Key, str]]) -> Iterator[Clash]:
    """Files named twice: in two splits they would be learned and judged at once; in one, cleaning drops the copies."""
    drops = recipe.data.clean.duplicates == "exact"
    first_of: dict[str, tuple[Key, str]] = {}
    seen: dict[tuple[str, Key], Key] = {}
    for at, name in lists:
        same = name if name.startswith("hub:") else os.path.realpath(resolve(name))
        first, first_name = first_of.setdefault(same, (at, name))
        here = seen.setdefault((same, _owner(at)), at)
        split, other = _split(at), _split(first)
        if split != other:
            says = f"'{name}' is in {other} too, so what is learned would also be the judge. Keep it in one of them"
            yield Clash(at, says, (first,))
        elif drops and here != at:
            yield Clash(at, f"'{name}' is listed twice and its copies would be dropped. Remove one", (here,))
        elif drops and name != first_name:
            says = f"is the file that {dotted(_owner(first))} names '{first_name}', and its copies would be dropped"
            yield Clash(at, f"{says}. Name it alike", (first,))


def _owner(at: Key) -> Key:
    """Who reads the file: a part of the recipe's data, or an expert."""
    return at[:2]


def _split(at: Key) -> str:
    return "train" if at[0] == "experts" else str(at[1])
