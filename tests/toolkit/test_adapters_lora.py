"""Kind lora: targets, scaling, PiSSA, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from toolkit.adapters import anatomy
from toolkit.adapters.contract import check_merged
from toolkit.adapters.kinds import kind_of
from toolkit.adapters.lora import chosen_layers
from toolkit.errors import AdapterError
from toolkit.recipe.model import Lora

LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def make_base(**changes: Any) -> Any:
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, **changes})).eval()


def attach(**options: Any) -> Any:
    chosen = Lora(**{"rank": 4, **options})
    return kind_of(chosen).attach(make_base(), chosen, seed=0)


def test_all_linear_means_every_linear_layer_and_never_the_head() -> None:
    assert chosen_layers(make_base(), "all-linear") == LINEAR
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4))
    assert chosen_layers(gpt2, "all-linear") == ["c_attn", "c_fc", "c_proj"]
    learning = {
        name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in attach().named_parameters() if p.requires_grad
    }
    assert sorted(learning) == LINEAR


def test_a_wrong_target_is_named_with_the_nearest_and_all_there_are() -> None:
    with pytest.raises(AdapterError, match=r"'q_prj' names no layer of this base\. Did you mean q_proj\?") as error:
        attach(targets=("q_prj", "v_proj", "언어"))
    assert "'언어' names no layer" in str(error.value)
    assert ", ".join(LINEAR) in str(error.value)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("lm_head", "is the head, which takes no adapter"),
        ("embed_tokens", "is the embedding, which takes no LoRA"),
        ("input_layernorm", "names modules that are not linear layers"),
        ("mlp", "names modules that are not linear layers"),
    ],
)
def test_what_is_not_a_linear_layer_is_refused(target: str, says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        attach(targets=("q_proj", target))


def test_a_head_that_is_called_like_other_layers_is_left_out() -> None:
    base = make_base()
    base.model.lm_head = torch.nn.Linear(4, 4)
    names = chosen_layers(base, "all-linear")
    assert "model.lm_head" in names
    assert "lm_head" not in names


@pytest.mark.parametrize(
    ("alpha", "stable", "scale"), [("2x", False, 2.0), (8, False, 2.0), ("1x", True, 2.0), (2.0, False, 0.5)]
)
def test_alpha_is_a_number_or_a_multiple_of_the_rank(alpha: Any, stable: bool, scale: float) -> None:
    model = attach(alpha=alpha, rank_stabilised=stable)
    assert model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == scale


def test_options_reach_peft() -> None:
    config = attach(dropout=0.25, dora=True, targets=("q_proj",)).peft_config["default"]
    assert (config.r, config.lora_dropout, config.use_dora, config.target_modules) == (4, 0.25, True, {"q_proj"})


def test_pissa_and_dora_together_are_refused() -> None:
    with pytest.raises(AdapterError, match="pissa cannot start a DoRA adapter"):
        attach(init="pissa", dora=True)


def test_pissa_starts_where_the_base_is() -> None:
    rows = torch.tensor([[5, 6, 7, 8]])
    torch.manual_seed(1)
    base = make_base()
    before = base(rows).logits
    after = kind_of(Lora()).attach(base, Lora(rank=4, init="pissa"), seed=0)(rows).logits
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)


def test_a_second_adapter_is_refused() -> None:
    options = Lora(rank=4)
    model = kind_of(options).attach(make_base(), options, seed=0)
    with pytest.raises(AdapterError, match="already has an adapter"):
        kind_of(options).attach(model, options, seed=0)


def test_the_same_adapter_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("하나", "둘"):
        torch.manual_seed(1)
        model = kind_of(Lora()).attach(make_base(), Lora(rank=4), seed=0)
        (tmp_path / name).mkdir()
        kind_of(Lora()).save(model, tmp_path / name, base="spoken-mini", base_hash="abc")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "하나" / file).read_bytes() == (tmp_path / "둘" / file).read_bytes()


@pytest.mark.parametrize(
    ("name_or_path", "said", "written"),
    [
        ("/home/minji/secret/spoken-mini", "", "spoken-mini"),
        ("/home/minji/secret/spoken-mini", "내 모델", "내 모델"),
        ("owner/name", "", "owner/name"),
        ("", "", None),
    ],
)
def test_the_base_is_named_as_its_user_named_it(
    name_or_path: str, said: str, written: str | None, tmp_path: Path
) -> None:
    base = make_base()
    base.name_or_path = name_or_path
    model = kind_of(Lora()).attach(base, Lora(rank=4), seed=0)
    kind_of(Lora()).save(model, tmp_path, base=said)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == written
    assert b"minji" not in (tmp_path / "adapter_model.safetensors").read_bytes()


def test_layers_that_the_base_lacks_are_not_passed_over(tmp_path: Path) -> None:
    model = kind_of(Lora()).attach(make_base(num_hidden_layers=3), Lora(rank=4), seed=0)
    kind_of(Lora()).save(model, tmp_path)
    config = tmp_path / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file(load_file(config), config, metadata={"format": "pt"})  # as others write it: without what we record
    with pytest.raises(AdapterError, match=r"layers\.2\..* has no place"):
        kind_of(Lora()).load(make_base(), tmp_path)


def test_restore_refuses_the_state_of_another_adapter() -> None:
    small, large = attach(rank=2), attach(rank=4)
    with pytest.raises(AdapterError, match="state is of another lora adapter"):
        kind_of(Lora()).restore(large, kind_of(Lora()).state(small))


def test_linear_layers_know_gpt2s_own_kind() -> None:
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4))
    assert anatomy.is_transposed(gpt2)
    assert not anatomy.is_transposed(make_base())


@pytest.mark.parametrize("wrong", [1e-4, float("nan")])
def test_a_merge_that_answers_differently_is_an_error(wrong: float) -> None:
    check_merged("lora", torch.tensor([0.0, 30.0]), torch.tensor([1e-4, 30.0]))
    with pytest.raises(AdapterError, match="answers differently: logits differ by"):
        check_merged("lora", torch.tensor([0.0, 1.0]), torch.tensor([wrong, 1.0]))
