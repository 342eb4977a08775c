"""What the tests of routing share: a tokenizer that takes text apart, a tiny base, a tiny encoder in a folder."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.stacked_world import make_base


@functools.cache
def spaced() -> Any:
    """A tokenizer of the words 말3 to 말95, apart at spaces; any other word is unknown."""
    known = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"말{number}": number for number in range(3, 96)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny_base(name: str = "llama") -> Any:
    """What a router needs of a LoadedBase."""
    return SimpleNamespace(model=make_base(name), tokenizer=spaced(), hash="그 베이스")


def save_bert(folder: Path, seed: int = 0) -> str:
    """A tiny random encoder as a plain folder; its path."""
    config = BertConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    spaced().save_pretrained(folder)
    return str(folder)
