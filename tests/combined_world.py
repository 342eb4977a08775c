"""What the tests of combining share: words for tiny bases, adapters as they lie in folders, merged ones at work."""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.stacked_world import World, make_base, save_random
from toolkit.generate import Sampling
from toolkit.stack.adapter import Adapter, read_adapter, write_adapter

GREEDY = Sampling(temperature=0.0, max_tokens=7)
PROMPTS = [[5, 17, 40, 9], [88, 23], [61, 7, 7, 12, 30, 55, 14]]


@functools.cache
def words() -> Any:
    """A tokenizer of as many words as the tiny bases know."""
    known = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"말{number}": number for number in range(3, 96)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(known, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def adapters(world: World, *names: str) -> dict[str, Adapter]:
    """Adapters of a world by name."""
    base = make_base(world.name)
    return {name: read_adapter(world.folders[name], base) for name in names}


def random_adapters(root: Path, base: str = "llama", **options: Any) -> dict[str, Adapter]:
    """Adapters far from their start, by name; their folders are root/NAME."""
    made = {}
    for seed, (name, one) in enumerate(options.items()):
        model = make_base(base)
        made[name] = read_adapter(save_random(one, make_base(base), root / name, seed), model)
    return made


def stacked_logits(world: World, adapter: Adapter, rows: Tensor) -> Tensor:
    """What an adapter answers alone in a stack, [B, T, V]."""
    stack = world.stack([])
    stack.add("it", adapter)
    with torch.no_grad():
        logits: Tensor = stack(rows, stack.owners(["it"] * len(rows))).logits
    return logits


def in_peft(adapter: Adapter, folder: Path, base: str) -> Any:
    """Plain PEFT's model of an adapter, by way of its folder."""
    import peft

    folder.mkdir()
    write_adapter(adapter, folder, make_base(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(make_base(base), str(folder)).eval()


def greedy(next_logits: Callable[[Tensor], Tensor], prompt: Sequence[int], sampling: Sampling) -> tuple[int, ...]:
    """The tokens that a plain loop takes, the whole row anew for each; `next_logits` of a row [1, T] gives [V]."""
    ids = list(prompt)
    for _ in range(sampling.max_tokens):
        token = int(next_logits(torch.tensor([ids])).argmax())
        if token == 2:
            break
        ids.append(token)
    return tuple(ids[len(prompt) :])
