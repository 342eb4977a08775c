"""Where a base lies: a folder, a base of the catalogue, or a model of the Hugging Face hub, fetched once into its
cache.

Nothing is fetched that the user did not name, and nothing at all where HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.bases import catalog
from toolkit.bases.files import WEIGHTS, WEIGHTS_INDEX
from toolkit.errors import BaseError
from toolkit.shipped import PREFIX, resolve, shipped

if TYPE_CHECKING:
    from toolkit.recipe.model import Base

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL = re.compile(r".*\.(json|jinja|model|txt)")
_TIMEOUT_S = 5.0


def find_folder(base: Base, *, weights: bool) -> Path:
    """The folder of a base: local first, else the hub's cache, else fetched from the hub; its weights only where
    asked for.

    Raises BaseError, within seconds where there is no network.
    """
    name = base.model
    if is_folder_name(name):
        folder = resolve(name).expanduser()
        if not folder.is_dir():
            raise BaseError(f"{name}: there is no such folder. Write the path of a folder that holds a model.")
        return _without_revision(base, folder)
    known = catalog.find(name)
    if known is not None and known.shipped:
        return _without_revision(base, shipped(f"base/{name}"))
    hub_id = known.hub_id if known is not None and known.hub_id else name
    if not _HUB_ID.fullmatch(hub_id):
        near = difflib.get_close_matches(name, [known.name for known in catalog.BASES], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else " Write a catalogue name, OWNER/NAME of the hub, or ./FOLDER."
        raise BaseError(f"{name}: neither a folder, nor a base of the catalogue, nor a hub id.{hint}")
    return _from_hub(hub_id, base, weights)


def is_folder_name(name: str) -> bool:
    """Whether a base's name means a folder: it looks like a path, is shipped (`maltu:`), or exists."""
    return name.startswith(("./", "../", "/", "~", ".\\", PREFIX)) or name in (".", "..") or Path(name).is_dir()


def _without_revision(base: Base, folder: Path) -> Path:
    if base.revision is not None:
        raise BaseError(
            f"{base.model}: base.revision names a version on the hub, and this base is a folder. Remove it."
        )
    return folder


def _from_hub(hub_id: str, base: Base, weights: bool) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.is_offline_mode():
        return _cached(hub_id, base.revision) or _raise_absent(hub_id, base.revision, "HF_HUB_OFFLINE is set")
    try:
        info = HfApi().model_info(hub_id, revision=base.revision, timeout=_TIMEOUT_S)
    except Exception as error:  # the hub's own errors, and those of whichever HTTP library it uses
        return _cached_unless_refused(hub_id, base.revision, error)
    names = _names_to_fetch([file.rfilename for file in info.siblings or []], hub_id, base, weights)
    try:
        with _quiet_unless_terminal():
            return Path(snapshot_download(hub_id, revision=info.sha, allow_patterns=names, etag_timeout=_TIMEOUT_S))
    except Exception as error:
        why = _first_line(error)
        raise BaseError(f"{hub_id}: fetching it from the hub failed ({why}). Run the command again.") from None


def _names_to_fetch(names: Sequence[str], hub_id: str, base: Base, weights: bool) -> list[str]:
    """Which of a repository's files to fetch: those that describe the model, and safetensors where asked for."""
    wanted = [name for name in names if "/" not in name and _SMALL.fullmatch(name)]
    if base.trust_remote_code:
        wanted += [name for name in names if name.endswith(".py")]
    if not weights:
        return wanted
    shards = [name for name in names if "/" not in name and re.fullmatch(r"model.*\.safetensors", name)]
    if WEIGHTS in shards:
        shards = [WEIGHTS]
    elif WEIGHTS_INDEX not in names:
        raise BaseError(
            f"{hub_id}: it has no weights in safetensors form, and only those are opened (a pickle runs code). Look "
            "for a revision or a copy that has them, and name it in base.model or base.revision."
        )
    return wanted + shards


def _cached(hub_id: str, revision: str | None) -> Path | None:
    """The snapshot that an earlier run fetched, without asking the network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except Exception as error:  # not there at all, or fetched without its weights
        folder = getattr(error, "snapshot_path", None)
        return Path(folder) if folder else None


def _cached_unless_refused(hub_id: str, revision: str | None, error: Exception) -> Path:
    """The cached snapshot after the hub failed; what the hub refused is the user's to solve, and raised."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        raise BaseError(
            f"{hub_id}: its owner wants you to accept a licence first. Do so at https://huggingface.co/{hub_id}, "
            "then log in with `hf auth login`."
        ) from None
    if isinstance(error, errors.RevisionNotFoundError):
        raise BaseError(f"{hub_id}: the hub has no revision {revision!r} of it. Correct base.revision.") from None
    if isinstance(error, errors.RepositoryNotFoundError):
        raise BaseError(
            f"{hub_id}: the hub has no such model, or it is private. Check the name, or run `hf auth login`."
        ) from None
    return _cached(hub_id, revision) or _raise_absent(hub_id, revision, f"the hub did not answer: {_first_line(error)}")


def _raise_absent(hub_id: str, revision: str | None, why: str) -> Path:
    version = f" (revision {revision})" if revision else ""
    raise BaseError(
        f"{hub_id}{version}: not on this machine, and it cannot be fetched: {why}. Connect to the network, or put "
        "the model's files into a folder and name that folder in base.model; spoken-mini needs no network."
    ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """A large download shows its progress to somebody who watches, and to nobody else."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_quiet = are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        if not was_quiet:
            enable_progress_bars()
