"""What single parts of a faster search give when they are put into the rival, search_rival.py, one after the other.

python benchmarks/search_parts.py one_base|lean_head OPTIONS OF search_rival.py

  one_base   the base is loaded once; every trial begins with its LoRA drawn anew
  lean_head  that, and a head that computes the loss of supervised positions alone, not the entropy and the most
             likely token of every position as TRL's does
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import search_rival
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.nn.functional import cross_entropy
from trl import SFTTrainer


def kept_model() -> Callable[[Path], PeftModel]:
    """What gives the same model every time, its LoRA as if it were new."""
    kept: list[PeftModel] = []

    def model_of(base: Path) -> PeftModel:
        if not kept:
            kept.append(search_rival.fresh_model(base))
        for module in kept[0].modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", init_lora_weights=True)
        kept[0].zero_grad(set_to_none=True)
        return kept[0]

    return model_of


class LeanHead(SFTTrainer):  # type: ignore[misc]  # trl has no types
    """SFTTrainer without the numbers about every token that it shows while training."""

    def compute_loss(
        self, model: PeftModel, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Sum over supervised tokens divided by their number in the whole optimizer step."""
        labels_BT = inputs.pop("labels")[:, 1:]
        keep_BT = labels_BT != -100
        whole = model.get_base_model()
        hidden_BTH = whole.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        logits_NV = whole.lm_head(hidden_BTH[keep_BT])
        count = keep_BT.sum() if num_items_in_batch is None else num_items_in_batch
        return cross_entropy(logits_NV, labels_BT[keep_BT], reduction="sum") / count


def main() -> None:
    """The rival with one part, or with both."""
    part, *rest = sys.argv[1:]
    search_rival.run(search_rival.arguments(rest), kept_model(), LeanHead if part == "lean_head" else None)


if __name__ == "__main__":
    main()
