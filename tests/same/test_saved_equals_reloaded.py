"""Reloaded equals saved in plain PEFT, with none of our code; merged equals unmerged, through a folder and back."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from toolkit.adapters.kinds import kind_of
from toolkit.recipe.model import Embedding, Full, Lora, PeftKind, Prefix
from toolkit.shipped import shipped

LLAMA = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
ROWS = torch.randint(5, 96, (2, 11), generator=torch.Generator().manual_seed(1))
ALL = torch.ones_like(ROWS)
THROUGH_PEFT = {
    "lora": Lora(rank=4),
    "lora, rank-stabilised": Lora(rank=4, rank_stabilised=True),
    "lora, dora": Lora(rank=4, dora=True),
    "prefix": Prefix(tokens=4),
    "prefix, projection": Prefix(tokens=4, projection=True),
    "ia3": PeftKind(kind="ia3", options={}),
    "vera": PeftKind(kind="vera", options={"r": 8}),
    "prompt_tuning": PeftKind(kind="prompt_tuning", options={"num_virtual_tokens": 4}),
    "p_tuning": PeftKind(kind="p_tuning", options={"num_virtual_tokens": 4}),
}
MERGED = {"lora": Lora(rank=4), "dora": Lora(rank=4, dora=True), "embedding": Embedding(), "full": Full()}


def make_base(config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return model.eval()


def trained(model: nn.Module, n_steps: int = 3) -> nn.Module:
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-2)
    for _ in range(n_steps):
        model(input_ids=ROWS, attention_mask=ALL, labels=ROWS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(input_ids=ROWS, attention_mask=ALL).logits
    return answer


def in_plain_peft(base: nn.Module, folder: Path) -> Tensor:
    """What plain PEFT answers; it gives logits for virtual tokens too, which are cut off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        model = peft.PeftModel.from_pretrained(base, str(folder))
    return logits(model.eval())[:, -ROWS.shape[1] :]


@pytest.mark.parametrize("options", THROUGH_PEFT.values(), ids=THROUGH_PEFT.keys())
def test_reloaded_in_plain_peft_equals_saved(options: Any, tmp_path: Path) -> None:
    kind = kind_of(options)
    model = trained(kind.attach(make_base(LLAMA), options, seed=0))
    kind.save(model, tmp_path, base="spoken-mini", base_hash="abc")
    torch.testing.assert_close(in_plain_peft(make_base(LLAMA), tmp_path), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_pissa_is_saved_as_plain_lora_for_the_untouched_base(
    config: Any, rank_stabilised: bool, tmp_path: Path
) -> None:
    options = Lora(rank=4, init="pissa", rank_stabilised=rank_stabilised)
    kind = kind_of(options)
    model = trained(kind.attach(make_base(config), options, seed=0))
    kind.save(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (written["r"], written["init_lora_weights"]) == (8, True)
    torch.testing.assert_close(in_plain_peft(make_base(config), tmp_path), logits(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("options", MERGED.values(), ids=MERGED.keys())
def test_merged_saved_and_loaded_by_transformers_equals_unmerged(options: Any, config: Any, tmp_path: Path) -> None:
    kind = kind_of(options)
    model = trained(kind.attach(make_base(config), options, seed=0))
    before = logits(model)
    merged: Any = kind.merge(model)
    merged.save_pretrained(tmp_path)
    after = logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_on_the_shipped_base_an_adapter_holds_no_path_and_reloads_in_plain_peft(tmp_path: Path) -> None:
    folder = shipped("base/spoken-mini")
    if not folder.is_dir():
        pytest.skip("the shipped base is not there")
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = Lora(rank=4)
    kind = kind_of(options)
    model = trained(kind.attach(base, options, seed=0), 1)
    kind.save(model, tmp_path)
    assert str(folder.parent) not in (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(in_plain_peft(again, tmp_path), logits(model), rtol=0, atol=0)
