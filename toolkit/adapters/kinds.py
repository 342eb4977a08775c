"""Which kind an `adapter` section asks for, and which kind a folder holds. Quick: a kind's heavy imports wait until
it is used.
"""

from pathlib import Path
from typing import Any

from toolkit.adapters import files
from toolkit.adapters.contract import Kind
from toolkit.adapters.embedding import EmbeddingKind
from toolkit.adapters.full import CONFIG as MODEL_CONFIG
from toolkit.adapters.full import FullKind
from toolkit.adapters.lora import LoraKind
from toolkit.adapters.peft_kinds import PeftKinds, refuse_unknown
from toolkit.adapters.prefix import PrefixKind
from toolkit.adapters.reft import ReftKind
from toolkit.errors import AdapterError


def kind_of(options: Any) -> Kind[Any]:
    """The kind that an `adapter` section of a recipe asks for.

    Raises: AdapterError for a name that is none, or that is refused, with the reason.
    """
    return _kind_named(options.kind)


def kind_in_folder(folder: Path) -> Kind[Any]:
    """The kind of the adapter saved in a folder: ours, plain PEFT's, or a whole model.

    Raises: AdapterError when the folder holds none, or one that this version cannot use.
    """
    if not (folder / files.CONFIG).is_file() and (folder / MODEL_CONFIG).is_file():
        return FullKind()
    config = files.read_config(folder)
    if "peft_type" not in config:
        ours = config.get("kind")
        if ours in ("reft", "embedding"):
            return _kind_named(ours)
        raise AdapterError(
            f"{folder}: its {files.CONFIG} names neither a kind of ours nor one of PEFT. Copy the adapter again."
        )
    name = str(config["peft_type"]).lower()
    return _kind_named("prefix" if name == "prefix_tuning" else name)


def _kind_named(name: str) -> Kind[Any]:
    ours: dict[str, type[Kind[Any]]] = {
        "lora": LoraKind,
        "prefix": PrefixKind,
        "reft": ReftKind,
        "embedding": EmbeddingKind,
        "full": FullKind,
    }
    if name in ours:
        return ours[name]()
    refuse_unknown(name)
    return PeftKinds(name)
