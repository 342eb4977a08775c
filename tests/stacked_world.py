"""What the tests of the stack share: tiny random bases, saved adapters of every kind, plain PEFT's answers."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from toolkit.adapters.kinds import kind_in_folder, kind_of
from toolkit.recipe.model import Embedding, Lora, Prefix, Reft
from toolkit.stack.stack import Stack

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
BASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "gpt2": lambda: GPT2Config(**GPT2),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=32),
    "neox": lambda: GPTNeoXConfig(**NEOX),
    "moe": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
}
OPTIONS: dict[str, Any] = {
    "lora": Lora(rank=4),
    "lora-7": Lora(rank=7, rank_stabilised=True),
    "lora-alpha": Lora(rank=4, alpha=3),
    "prefix": Prefix(tokens=4),
    "prefix-2": Prefix(tokens=2),
    "reft": Reft(rank=2),
    "reft-5": Reft(rank=5, layers=(1,)),
    "embedding": Embedding(),
}
SEEN = list(range(5, 60))
TOLERANCE = 2e-6


def make_base(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A tiny random base, the same one every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(BASES[name]())
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.05
    return model.to(dtype).eval()


def some_rows(n_rows: int = 4, n_tokens: int = 11, seed: int = 1) -> Tensor:
    """Token ids, none of them padding."""
    return torch.randint(5, 96, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def off(left: Tensor, right: Tensor) -> float:
    """The largest difference."""
    return (left.float() - right.float()).abs().max().item()


def save_random(options: Any, base: nn.Module, folder: Path, seed: int = 0) -> Path:
    """An adapter far from its start, saved as its kind saves it."""
    kind = kind_of(options)
    model = kind.attach(base, options, seed=seed, token_ids=SEEN)
    noise = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for tensor in kind.state(model).values():
            if tensor.is_floating_point():
                tensor += 0.05 * torch.randn(tensor.shape, generator=noise).to(tensor.dtype)
    folder.mkdir(parents=True)
    kind.save(model, folder, base="작은 말", base_hash="abc")
    return folder


def worn(folder: Path, base: nn.Module) -> Any:
    """The base with the one adapter, by plain PEFT where it knows the kind."""
    if (folder / "adapter_model.safetensors").exists():
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(base, str(folder)).eval()
    return kind_in_folder(folder).load(base, folder)


class World:
    """One base and an adapter of every option, each on disk; what each answers alone is computed once a row."""

    def __init__(self, root: Path, base: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        self.name, self.dtype = base, dtype
        self.folders = {
            name: save_random(options, make_base(base, dtype), root / name, seed)
            for seed, (name, options) in enumerate(OPTIONS.items())
        }
        self._alone: dict[str | None, Any] = {}

    def stack(self, names: Sequence[str] = tuple(OPTIONS), **options: Any) -> Stack:
        """A fresh stack with these adapters on a fresh base."""
        stack = Stack(make_base(self.name, self.dtype), **options)
        for name in names:
            stack.add(name, self.folders[name])
        return stack

    def alone(self, name: str | None, row_T: Tensor) -> Tensor:
        """The logits [T, V] of one row on the base with this adapter alone."""
        if name not in self._alone:
            base = make_base(self.name, self.dtype)
            self._alone[name] = base if name is None else worn(self.folders[name], base)
        with torch.no_grad():
            rows = row_T.unsqueeze(0)
            logits: Tensor = self._alone[name](input_ids=rows, attention_mask=torch.ones_like(rows)).logits
        return logits[0]


class Worlds:
    """A world for each base and type, made when it is first asked for."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._made: dict[tuple[str, torch.dtype], World] = {}

    def __call__(self, base: str, dtype: torch.dtype = torch.float32) -> World:
        if (base, dtype) not in self._made:
            self._made[base, dtype] = World(self._folders.mktemp(base) / "adapters", base, dtype)
        return self._made[base, dtype]


def padded(rows: Sequence[Tensor], side: str, width: int) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one batch and its mask."""
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def worlds_of(bases: Mapping[str, Callable[[], Any]], folders: pytest.TempPathFactory) -> Iterator[Worlds]:
    """For a fixture: worlds that know these bases besides."""
    with pytest.MonkeyPatch.context() as patch:
        for name, config in bases.items():
            patch.setitem(BASES, name, config)
        yield Worlds(folders)
