"""An opened model equals PEFT's own forward and generate for every way an adapter can sit in a model."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from tests.mini_world import base_folder, tokenizer
from toolkit.adapters.opened import measuring, open_model
from toolkit.errors import AdapterError
from toolkit.generate import Sampling, generate

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,  # importing peft alone takes five seconds
    # peft 0.21.2 asks transformers for a property by its old name, and warns of the positions its own generate passes
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

KINDS = ["lora", "prefix", "prefix_projection", "prompt_tuning", "p_tuning", "ia3"]
GREEDY = Sampling(temperature=0.0, max_tokens=10)


def worn(kind: str) -> Any:
    """spoken-mini with an adapter that moves it far from the base."""
    torch.manual_seed(0)
    configs = {
        "lora": lambda: peft.LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        ),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "prefix_projection": lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=5, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=16
        ),
        "prompt_tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "p_tuning": lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=5, task_type="CAUSAL_LM", encoder_hidden_size=16
        ),
        "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    }
    base = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)
    model = peft.get_peft_model(base, configs[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids_of(text: str) -> list[int]:
    return list(tokenizer()(f"<|user|>{text}<|end|><|assistant|>", add_special_tokens=False)["input_ids"])


PROMPTS = ["오늘 뭐 먹지?", "안녕", "I missed the bus by two seconds and it rains"]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_equal_those_of_peft(kind: str) -> None:
    model = worn(kind)
    for text, ours in zip(PROMPTS, generate(model, tokenizer(), [ids_of(t) for t in PROMPTS], GREEDY), strict=True):
        ids = torch.tensor([ids_of(text)])
        theirs = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :].tolist()
        assert list(ours.ids) == [token for token in theirs if token != 4]


@pytest.mark.parametrize("kind", KINDS)
def test_kept_logits_equal_the_forward_of_peft(kind: str) -> None:
    model, ids = worn(kind), torch.tensor([ids_of(PROMPTS[2])])
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[0, [2, 5, -1]] = True
    with measuring(model) as opened, torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :][keep]
        torch.testing.assert_close(opened.logits(ids, torch.ones_like(ids), None, keep), theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_is_neutral(kind: str) -> None:
    model, ids = worn(kind), ids_of(PROMPTS[0])
    with measuring(model) as opened:
        alone = opened.logits(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), opened.start(1))
        for before, after in ((6, 0), (0, 6), (3, 3)):
            row = torch.tensor([[7] * before + ids + [7] * after])
            mask = torch.tensor([[0] * before + [1] * len(ids) + [0] * after])
            keep = torch.zeros_like(mask, dtype=torch.bool)
            keep[0, before + len(ids) - 1] = True
            torch.testing.assert_close(opened.logits(row, mask, None, keep), alone, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt_tuning"])
def test_a_disabled_adapter_leaves_the_base(kind: str) -> None:
    model, ids = worn(kind), [ids_of(text) for text in PROMPTS]
    base = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32).eval()
    with model.disable_adapter():
        disabled = generate(model, tokenizer(), ids, GREEDY)
    assert disabled == generate(base, tokenizer(), ids, GREEDY)
    assert generate(model, tokenizer(), ids, GREEDY) != disabled


def test_a_prefix_before_a_sliding_window_is_not_pushed_out_by_padding() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=8192, head_dim=16, num_key_value_heads=1, sliding_window=12, layer_types=layers, **shape
    )
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", token_dim=16, num_attention_heads=1)
    model = peft.get_peft_model(Gemma3ForCausalLM(config), prefix).eval()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).mul_(20.0)
    prompts = [[9, 8, 7], [5] * 14, [6, 5, 9]]
    together = generate(model, tokenizer(), prompts, GREEDY)
    assert together == [generate(model, tokenizer(), [prompt], GREEDY)[0] for prompt in prompts]


def test_a_prefix_takes_its_share_of_the_context() -> None:
    config = GPT2Config(vocab_size=8192, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = peft.get_peft_model(GPT2LMHeadModel(config), prefix).eval()
    assert len(generate(model, tokenizer(), [[9] * 20], Sampling(temperature=0.0), ends=frozenset())[0].ids) == 7


def test_a_kind_that_needs_a_task_with_every_row_is_refused() -> None:
    base = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)
    config = peft.MultitaskPromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", num_tasks=2)
    with pytest.raises(AdapterError, match="task id"):
        open_model(peft.get_peft_model(base, config))
