"""PEFT's other kinds, by PEFT's own names; `options` go to that kind's config, once every key is known to be its.

Which names are kinds, and why some are refused, stands in toolkit/recipe/adapter.py, which needs no PEFT to say so.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from toolkit.adapters import anatomy, files, through_peft
from toolkit.adapters.contract import Kind, refuse_merge
from toolkit.adapters.prefix import as_prompted, refuse_base
from toolkit.errors import AdapterError

if TYPE_CHECKING:
    from toolkit.recipe.model import PeftKind

# What the config of a kind cannot do without, though PEFT gives it a default of None or refuses late.
REQUIRED = {
    "adaption_prompt": ("adapter_layers", "adapter_len"),
    "p_tuning": ("num_virtual_tokens",),
    "prompt_tuning": ("num_virtual_tokens",),
}
OURS_TO_SET = frozenset(
    "task_type peft_type base_model_name_or_path revision inference_mode auto_mapping peft_version".split()
)
# Options that save, or change, more than the adapter.
NOT_HERE = {
    "modules_to_save": "it keeps whole layers of the base beside the adapter. Use kind full to train them.",
    "bias": "PEFT does not save biases for every kind. Leave it out.",
    "trainable_token_indices": "it fails on tied embeddings. Use kind embedding.",
}
UNMERGEABLE = {
    "adaption_prompt": "it adds attention to learned positions",
    "beft": "it adds biases that most bases do not have",
    "p_tuning": "its learned embeddings stand before every row",
    "prompt_tuning": "its learned embeddings stand before every row",
    "shadow": "it runs small layers of its own beside the base's",
}


class PeftKinds(Kind["PeftKind"]):
    """Every kind that PEFT names and Maltu does not: one class, since PEFT's config tells them apart."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.mergeable = name not in UNMERGEABLE

    def attach(
        self,
        model: nn.Module,
        options: "PeftKind",
        *,
        seed: int,
        token_ids: Sequence[int] | None = None,
        tokenizer: Any = None,
    ) -> nn.Module:
        """See Kind.attach."""
        del token_ids, tokenizer
        through_peft.refuse_second(model)
        if self.name in ("prompt_tuning", "p_tuning"):
            refuse_base(model, self.name)
        wrapped = through_peft.attach(model, _config(model, self.name, options.options), kind=self.name, seed=seed)
        return self._called_right(wrapped)

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """See Kind.parameters."""
        return through_peft.parameters(model)

    def save(self, model: nn.Module, folder: Path, *, base: str = "", base_hash: str = "") -> None:
        """See Kind.save; plain PeftModel.from_pretrained opens the folder."""
        through_peft.save(model, folder, kind=self.name, origin=files.Origin(base, base_hash, anatomy.shape_of(model)))

    def load(self, model: nn.Module, folder: Path, *, base_hash: str = "") -> nn.Module:
        """See Kind.load."""
        return self._called_right(through_peft.load(model, folder, kind=self.name, base_hash=base_hash))

    def merge(self, model: nn.Module) -> nn.Module:
        """See Kind.merge."""
        if self.name in UNMERGEABLE:
            raise refuse_merge(self.name, UNMERGEABLE[self.name])
        return through_peft.merge(model, kind=self.name)

    def detach(self, model: nn.Module) -> nn.Module:
        """See Kind.detach."""
        return through_peft.detach(model, kind=self.name)

    def _called_right(self, wrapped: Any) -> nn.Module:
        return as_prompted(wrapped) if self.name in ("prompt_tuning", "p_tuning") else wrapped


def refuse_unknown(name: str) -> None:
    """AdapterError, with the reason or the nearest name, for a name that is not a kind of PEFT that works here."""
    from toolkit.recipe.adapter import PEFT_KINDS, REFUSED_KINDS

    if name in REFUSED_KINDS:
        raise AdapterError(f"adapter.kind: {name} is not to be had here: {REFUSED_KINDS[name]}")
    if name not in PEFT_KINDS:
        near = difflib.get_close_matches(name, [*PEFT_KINDS, "lora", "prefix", "reft", "embedding", "full"], n=1)
        raise AdapterError(f"adapter.kind: '{name}' is not a kind.{f' Did you mean {near[0]}?' if near else ''}")


def _config(model: nn.Module, name: str, options: dict[str, Any]) -> Any:
    """PEFT's config of that kind; AdapterError naming every key that is not one of its, and what is missing."""
    with through_peft.quiet():
        import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    made = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name.upper())]
    fields = {field.name for field in dataclasses.fields(made) if field.init} - OURS_TO_SET - NOT_HERE.keys()
    problems = [_key_problem(key, fields) for key in options if key not in fields]
    problems += [f"{key} is needed." for key in REQUIRED.get(name, ()) if options.get(key) is None]
    if problems:
        raise AdapterError(f"adapter.options of kind {name}: {' '.join(problems)}")
    if "fan_in_fan_out" in fields and "fan_in_fan_out" not in options:
        options = options | {"fan_in_fan_out": anatomy.is_transposed(model)}
    try:
        with through_peft.quiet():
            return made(task_type="CAUSAL_LM", **options)
    except through_peft.PEFT_ERRORS as error:
        raise AdapterError(f"adapter.options of kind {name}: {through_peft.said(error)}") from error


def _key_problem(key: str, fields: set[str]) -> str:
    if key in OURS_TO_SET:
        return f"{key} is set by Maltu."
    if key in NOT_HERE:
        return f"{key}: {NOT_HERE[key]}"
    near = difflib.get_close_matches(key, fields, n=1)
    return f"{key} is not a key of its config.{f' Did you mean {near[0]}?' if near else ''}"
