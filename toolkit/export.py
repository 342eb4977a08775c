"""Take a trained voice out of its run: as a plain Hugging Face folder with the adapter merged in, or to a model hub."""

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit.adapters.contract import Kind
from toolkit.adapters.kinds import kind_in_folder
from toolkit.bundle import open_run
from toolkit.combine.speaker import MAIN, open_speaker, speaks
from toolkit.disk import write_folder
from toolkit.errors import RunError
from toolkit.loaded import WHOLE_MODEL, load_run
from toolkit.quiet import quiet

HUB = "hub:"
# What a run keeps to go on, or for itself alone, and what can run code when it is read: never pushed.
KEPT_HERE = ("checkpoints", "search", "tensorboard", "trackio", "wandb")
NOT_PUSHED = (
    *(f"{before}{name}/*" for name in KEPT_HERE for before in ("", "*/")),
    *(".*", "*/.*", "*.bin", "*.pt", "*.pth", "*.pkl"),
)


@dataclass(frozen=True)
class Exported:
    """What goes into an exported folder beside the weights.

    template: the chat template, None for the tokenizer's own; generation: keys of a Hugging Face generation config;
    base_hash: the fingerprint of the base loaded; dtype: the type of the weights written.
    """

    template: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    base_hash: str = ""
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "5GB"


def export_merged(
    model: nn.Module, tokenizer: Any, kind: Kind[Any], adapter: Path, out: Path, wanted: Exported | None = None
) -> Path:
    """Write a plain Hugging Face folder (weights, tokenizer, template, generation config): base + adapter.

    `model` is a fresh base and is used up. The logits are those of base + adapter in float32; another `wanted.dtype`
    rounds them. The folder appears whole or not at all.
    Raises: AdapterError when the kind cannot be merged or the adapter does not fit; RunError when `out` is in use or
    cannot be written.
    """
    wanted = wanted or Exported()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: is there already. Name a folder that does not exist, or empty this one.")
    if not kind.mergeable:
        kind.merge(model)
    merged: Any = kind.merge(kind.load(model, adapter, base_hash=wanted.base_hash))
    merged = merged.to(wanted.dtype)
    merged.generation_config.update(**wanted.generation)

    def fill(folder: Path) -> None:
        merged.save_pretrained(folder, max_shard_size=wanted.max_shard_size)
        _save_tokenizer(tokenizer, wanted.template, folder)

    write_folder(out, fill)
    return out


def hub_target(target: str) -> str | None:
    """The repository of a target `hub:USER/NAME`; None for a target that is not on a hub.

    Raises: RunError when it does not read USER/NAME.
    """
    if not target.startswith(HUB):
        return None
    name = target[len(HUB) :]
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise RunError(f"{target}: not a place on a hub. Write hub:USER/NAME, as in hub:minji/casual-chat.")
    return name


def push_to_hub(folder: Path, target: str, *, public: bool = False) -> str:
    """Send a folder to `hub:USER/NAME`, made if it is not there (private unless `public`); returns its address.

    Checkpoints, logs, hidden files and pickles stay here.
    Raises: RunError when the folder holds nothing to send, nobody is logged in, its README.md has a heading that the
    hub does not take, or the hub cannot be reached or refuses.
    """
    repository = hub_target(target)
    if repository is None:
        raise RunError(f"{target}: not a place on a hub. Write hub:USER/NAME.")
    if not folder.is_dir() or not any(folder.iterdir()):
        raise RunError(f"{folder}: nothing to send. Name a run or an exported folder.")
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        sent = api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=list(NOT_PUSHED))
    except errors.LocalTokenNotFoundError as error:
        raise RunError(f"{target}: nobody is logged in. Run `hf auth login`, or set HF_TOKEN.") from error
    except errors.OfflineModeIsEnabled as error:
        raise RunError(f"{target}: HF_HUB_OFFLINE is set. Unset it to send.") from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise RunError(
            f"{target}: the hub refused ({error}). Check the name, and that your token may write."
        ) from error
    except ValueError as error:  # the hub's client checks the heading of README.md before it sends
        raise RunError(
            f"{target}: the hub does not take the heading of {folder / 'README.md'} ({error}). Mend it and send again."
        ) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise RunError(f"{target}: the hub cannot be reached ({error}). Check the network and try again.") from error
    return str(sent.repo_url)


def _save_tokenizer(tokenizer: Any, template: str | None, folder: Path) -> None:
    """Write the tokenizer with the template, and leave the caller's as it was."""
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = own if template is None else template
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """export RUN --to merged | hub:USER/NAME [--out FOLDER] [--public]."""
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--to", required=True, metavar="merged|hub:USER/NAME", help="a plain model, or a hub")
    parser.add_argument("--out", type=Path, help="where the plain model goes (default: RUN-merged)")
    parser.add_argument("--adapter", metavar="NAME", help="with --to merged: one expert of a run that has several")
    parser.add_argument("--public", action="store_true", help="on a hub: visible to everyone")


def export(arguments: argparse.Namespace) -> int:
    """Write the run as a plain model folder, or send the run folder to a hub as it is."""
    with quiet():
        return _export(arguments)


def _export(arguments: argparse.Namespace) -> int:
    run: Path = arguments.run
    if hub_target(arguments.to) is not None:
        if arguments.out is not None:
            raise RunError(
                f"--out {arguments.out}: only with --to merged; to a hub the run goes as it is. Leave it out."
            )
        if arguments.adapter is not None:
            raise RunError("--adapter: only with --to merged; to a hub the run goes as it is. Leave it out.")
        _check(run)  # what does not load here must not be sent
        sys.stdout.write(f"{push_to_hub(run, arguments.to, public=arguments.public)}\n")
        return 0
    if arguments.to != "merged":
        raise RunError(f"--to {arguments.to}: not a target. Write merged, or hub:USER/NAME.")
    if arguments.public:
        raise RunError("--public: only with --to hub:USER/NAME; a folder here has no readers to choose. Leave it out.")
    named = run if run.name else run.resolve()  # the run may be the working directory
    out = arguments.out or named.with_name(f"{named.name}-merged")
    whole = run / WHOLE_MODEL
    name = _adapter(run, arguments.adapter)
    loaded = load_run(run, "cpu", with_adapter=whole.is_dir())
    wanted = Exported(loaded.renderer.template, _generation(loaded.sampling), loaded.base.hash)
    folder = whole if whole.is_dir() else loaded.run.adapter(name)
    export_merged(loaded.base.model, loaded.base.tokenizer, kind_in_folder(folder), folder, out, wanted)
    sys.stdout.write(f"{out}: a plain model; AutoModelForCausalLM.from_pretrained opens it.\n")
    return 0


def _check(run: Path) -> None:
    """Open the run whole. Raises: what opening it raises."""
    if speaks(run):
        open_speaker(run, "cpu")
    else:
        load_run(run, "cpu")


def _adapter(run: Path, asked: str | None) -> str:
    """The adapter to merge in. Raises: RunError for one that is not there, and where several answer together."""
    there = open_run(run).adapters()
    if asked is not None and asked not in there:
        raise RunError(f"--adapter {asked}: {run} has none of that name. There are: {', '.join(there) or 'none'}.")
    if asked is None and speaks(run):
        raise RunError(
            f"{run}: several adapters answer together, and no plain model does what they do. Export one with --adapter"
            f" NAME ({', '.join(there)}), or train with combine: {{kind: merge}}."
        )
    return asked or MAIN


def _generation(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The run's sampling in the words of a Hugging Face generation config."""
    return {
        "do_sample": sampling["temperature"] > 0,
        "temperature": sampling["temperature"] or 1.0,
        "top_p": sampling["top_p"],
        "max_new_tokens": sampling["max_tokens"],
    }
