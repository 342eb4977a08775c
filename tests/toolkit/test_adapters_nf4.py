"""Adapters on a base in 4 bits (QLoRA): the numbers stay what they are, on a CPU too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from toolkit.adapters.kinds import kind_of
from toolkit.errors import AdapterError
from toolkit.recipe.model import Embedding, Full, Lora, Prefix, Reft

LLAMA = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
ROWS = torch.randint(5, 96, (2, 11), generator=torch.Generator().manual_seed(1))
KINDS = {"lora": Lora(rank=4), "prefix": Prefix(tokens=4), "reft": Reft(rank=2), "embedding": Embedding()}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")]


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: install the extra gpu")
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA)).save_pretrained(folder)
    return folder


def in_4_bits(folder: Path) -> Any:
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, device_map="cpu")
    return model


def trained(options: Any, base: Any) -> Any:
    model: Any = kind_of(options).attach(base, options, seed=0).train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ROWS, attention_mask=torch.ones_like(ROWS), labels=ROWS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(input_ids=ROWS, attention_mask=torch.ones_like(ROWS)).logits
    return answer


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_an_adapter_trains_on_4_bits_and_reloads_what_was_saved(options: Any, saved_base: Path, tmp_path: Path) -> None:
    model = trained(options, in_4_bits(saved_base))
    kind_of(options).save(model, tmp_path)
    loaded = kind_of(options).load(in_4_bits(saved_base), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_evaluating_does_not_move_the_numbers_of_training(options: Any, saved_base: Path) -> None:
    model = trained(options, in_4_bits(saved_base))
    with torch.enable_grad():
        before = model.train()(input_ids=ROWS, attention_mask=torch.ones_like(ROWS)).logits.detach()
    logits(model.eval())
    after = model.train()(input_ids=ROWS, attention_mask=torch.ones_like(ROWS)).logits.detach()
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["lora", "embedding"])
def test_merged_is_a_plain_model_that_answers_as_the_4_bits_did(name: str, saved_base: Path, tmp_path: Path) -> None:
    model = trained(KINDS[name], in_4_bits(saved_base))
    before = logits(model)
    merged: Any = kind_of(KINDS[name]).merge(model)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), before, rtol=0, atol=1e-5)


def test_a_base_that_was_repacked_takes_no_adapter(saved_base: Path) -> None:
    base = in_4_bits(saved_base)
    if not getattr(base.model.layers[0].mlp.up_proj, "support_avx512bf16_for_cpu", False):
        pytest.skip("this CPU has no bf16 units, so bitsandbytes repacks nothing")
    logits(base)
    with pytest.raises(AdapterError, match="repacked for the CPU"):
        kind_of(Lora()).attach(base, Lora(rank=4), seed=0)


def test_full_and_pissa_are_refused_on_4_bits(saved_base: Path) -> None:
    with pytest.raises(AdapterError, match="cannot train a quantised base"):
        kind_of(Full()).attach(in_4_bits(saved_base), Full(), seed=0)
    with pytest.raises(AdapterError, match="pissa needs a base in float32, and this one is quantised"):
        kind_of(Lora()).attach(in_4_bits(saved_base), Lora(init="pissa"), seed=0)
