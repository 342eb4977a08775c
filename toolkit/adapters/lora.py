"""LoRA through PEFT (arXiv 2106.09685), with rank-stabilised scaling, DoRA and a PiSSA start; saved as a plain PEFT
folder.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolkit.adapters import anatomy, files, through_peft
from toolkit.adapters.contract import Kind
from toolkit.errors import AdapterError

if TYPE_CHECKING:
    from toolkit.recipe.model import Lora

PISSA_START = "maltu_pissa_start"  # where an attached adapter remembers what PiSSA took out of the base


class LoraKind(Kind["Lora"]):
    """Kind `lora`."""

    name = "lora"
    stackable = True
    mergeable = True

    def attach(
        self,
        model: nn.Module,
        options: "Lora",
        *,
        seed: int,
        token_ids: Sequence[int] | None = None,
        tokenizer: Any = None,
    ) -> nn.Module:
        """See Kind.attach. Starts as the base's own answers (with PiSSA: up to rounding)."""
        del token_ids, tokenizer
        through_peft.refuse_second(model)
        targets = chosen_layers(model, options.targets)
        if options.init == "pissa":
            _check_pissa(model, options)
        config = _config(model, options, targets, task_type="CAUSAL_LM")
        wrapped = through_peft.attach(model, config, kind=self.name, seed=seed)
        if options.init == "pissa":
            start = {name: tensor.detach().clone() for name, tensor in through_peft.parameters(wrapped).items()}
            setattr(wrapped, PISSA_START, start)
        return wrapped  # type: ignore[no-any-return]

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """See Kind.parameters. After a PiSSA start, those of the plain LoRA of twice the rank that does the same on
        the untouched base.
        """
        tensors = through_peft.parameters(model)
        start = getattr(model, PISSA_START, None)
        return tensors if start is None else _plain_from_pissa(tensors, start)

    def save(self, model: nn.Module, folder: Path, *, base: str = "", base_hash: str = "") -> None:
        """See Kind.save; plain PeftModel.from_pretrained opens the folder."""
        origin = files.Origin(base, base_hash, anatomy.shape_of(model))
        if getattr(model, PISSA_START, None) is None:
            through_peft.save(model, folder, kind=self.name, origin=origin)
            return
        config = through_peft.config_of(model)
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        plain = config.to_dict() | {
            "r": 2 * config.r,
            "lora_alpha": scale * 2 * config.r,
            "use_rslora": False,
            "init_lora_weights": True,
        }
        through_peft.write(folder, self.name, plain, self.parameters(model), origin)

    def load(self, model: nn.Module, folder: Path, *, base_hash: str = "") -> nn.Module:
        """See Kind.load; reads plain PEFT folders, those of others too."""
        return through_peft.load(model, folder, kind=self.name, base_hash=base_hash)  # type: ignore[no-any-return]

    def merge(self, model: nn.Module) -> nn.Module:
        """See Kind.merge."""
        return through_peft.merge(model, kind=self.name)

    def detach(self, model: nn.Module) -> nn.Module:
        """See Kind.detach; refused after a PiSSA start, which moved part of the base's weights into the adapter."""
        if getattr(model, PISSA_START, None) is not None:
            return super().detach(model)
        return through_peft.detach(model, kind=self.name)


def attach_labelling(model: nn.Module, options: "Lora", *, seed: int, head: Sequence[str]) -> nn.Module:
    """Put a new LoRA adapter on an encoder that labels texts; the modules of its `head` (full names) learn whole.

    `LoraKind.save` and `load` take what comes out: a plain PEFT folder with the head in it.
    Raises: AdapterError when the options do not fit, a target among the head's modules included.
    """
    if options.init == "pissa":
        raise AdapterError("adapter.init: pissa is not for an encoder in this version. Write init: default.")

    def is_of_head(name: str) -> bool:
        return any(name == module or name.startswith(f"{module}.") for module in head)

    linear = list(anatomy.linear_layers(model))
    asked = None if isinstance(options.targets, str) else options.targets
    named = chosen_layers(model, options.targets)
    chosen = [name for name in linear if any(name == one or name.endswith(f".{one}") for one in named)]
    wrong = [one for one in asked or () if all(is_of_head(name) for name in chosen if name.endswith(one))]
    if wrong:
        raise AdapterError(f"adapter.targets: '{wrong[0]}' is of the head, which learns whole. Leave it out.")
    targets = sorted(name for name in chosen if not is_of_head(name))
    config = _config(model, options, targets, task_type="SEQ_CLS", modules_to_save=list(head))
    return through_peft.attach(model, config, kind="lora", seed=seed)  # type: ignore[no-any-return]


def _config(model: nn.Module, options: "Lora", targets: Sequence[str], **more: Any) -> Any:
    """PEFT's words for the options."""
    with through_peft.quiet():
        import peft

    return peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha_number,
        lora_dropout=options.dropout,
        target_modules=list(targets),
        use_rslora=options.rank_stabilised,
        use_dora=options.dora,
        init_lora_weights="pissa" if options.init == "pissa" else True,
        fan_in_fan_out=anatomy.is_transposed(model),
        **more,
    )


def chosen_layers(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The names to hand to PEFT for `all-linear` or a list: each names linear layers, and none the head.

    Raises: AdapterError naming every wrong target and the names there are (PEFT is silent as long as one of them
    matches).
    """
    linear = anatomy.linear_layers(model)
    short = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if isinstance(targets, str):
        if targets != "all-linear":
            raise AdapterError(
                f"adapter.targets: '{targets}' is not a choice. Use all-linear or a list of: {', '.join(short)}."
            )
        extra = [name for name, _ in model.named_modules() if name not in linear and name.rsplit(".", 1)[-1] in short]
        return sorted(linear) if extra else short
    problems = [problem for target in targets if (problem := _target_problem(model, linear, short, target))]
    if problems or not targets:
        raise AdapterError(
            f"adapter.targets: {' '.join(problems) or 'the list is empty.'} This base has: {', '.join(short)}."
        )
    return sorted(set(targets))


def _target_problem(model: nn.Module, linear: Mapping[str, nn.Module], short: Sequence[str], target: str) -> str | None:
    named = {name: module for name, module in model.named_modules() if name == target or name.endswith(f".{target}")}
    if any(module is anatomy.output_embeddings(model) for module in named.values()):
        return f"'{target}' is the head, which takes no adapter."
    if any(isinstance(module, nn.Embedding) for module in named.values()):
        return f"'{target}' is the embedding, which takes no LoRA (kind embedding trains it)."
    if named and all(name in linear for name in named):
        return None
    near = difflib.get_close_matches(target, short, n=1)
    what = "names modules that are not linear layers" if named else "names no layer of this base"
    return f"'{target}' {what}.{f' Did you mean {near[0]}?' if near else ''}"


def _check_pissa(model: nn.Module, options: "Lora") -> None:
    """PiSSA takes its part out of the base's weights: only float32 gives it back without loss."""
    if options.dora:
        raise AdapterError("adapter.init: pissa cannot start a DoRA adapter. Set dora to false, or init to default.")
    kinds = {str(module.weight.dtype) for module in anatomy.linear_layers(model).values()}
    if anatomy.is_quantised(model) or kinds != {"torch.float32"}:
        raise AdapterError(
            "adapter.init: pissa needs a base in float32, and this one is "
            f"{'quantised' if anatomy.is_quantised(model) else ', '.join(kinds)}. "
            "Load it in float32, or set init to default."
        )


def _plain_from_pissa(now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PiSSA left W - s B0 A0 in the base and trained B A: on W itself that is s (B A - B0 A0), a LoRA of twice the
    rank.
    """
    plain = {}
    for name, tensor in now.items():
        first = start[name].to(tensor.device)
        plain[name] = torch.cat(
            [tensor, first] if ".lora_A." in name else [tensor, -first], dim=0 if ".lora_A." in name else 1
        )
    return plain
