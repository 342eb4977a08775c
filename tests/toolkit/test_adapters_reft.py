"""Kind reft: the edit itself, the layers it takes, and its folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from toolkit.adapters import anatomy
from toolkit.adapters.kinds import kind_in_folder, kind_of
from toolkit.adapters.reft import Edit, orthonormal
from toolkit.errors import AdapterError
from toolkit.recipe.model import Reft

LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
ROWS = torch.randint(5, 96, (2, 11), generator=torch.Generator().manual_seed(1))


def make_base() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA)).eval()


def trained(options: Reft, base: Any = None) -> Any:
    model: Any = kind_of(options).attach(base or make_base(), options, seed=0).train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-2)
    for _ in range(3):
        model(input_ids=ROWS, labels=ROWS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_the_edit_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    edit = Edit(hidden=8, rank=3, dropout=0.0)
    with torch.no_grad():
        edit.weight.normal_()
        edit.bias.normal_()
    hidden = torch.randn(2, 5, 8)
    rotation = edit.rotation_RH()
    wanted = hidden + (hidden @ edit.weight.mT + edit.bias - hidden @ rotation.mT) @ rotation
    torch.testing.assert_close(edit(hidden), wanted, rtol=0, atol=1e-5)


def test_the_rows_of_r_stay_orthonormal_while_it_learns() -> None:
    model = trained(Reft(rank=3))
    for name, tensor in kind_of(Reft()).parameters(model).items():
        if name.endswith("rotation"):
            torch.testing.assert_close(tensor @ tensor.mT, torch.eye(3), rtol=0, atol=1e-5)
            assert not torch.equal(tensor, kind_of(Reft()).parameters(make_attached(Reft(rank=3)))[name])


def make_attached(options: Reft) -> Any:
    return kind_of(options).attach(make_base(), options, seed=0)


def test_orthonormal_spans_the_same_rows() -> None:
    matrix = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    rows = orthonormal(matrix)
    torch.testing.assert_close(matrix @ rows.mT @ rows, matrix, rtol=0, atol=1e-5)
    torch.testing.assert_close(orthonormal(rows), rows, rtol=0, atol=1e-6)


def test_what_evaluation_keeps_is_dropped_when_the_adapter_changes() -> None:
    kind, model = kind_of(Reft()), trained(Reft(rank=2))
    state = {name: tensor.clone() for name, tensor in kind.state(model).items()}
    with torch.no_grad():
        before = model(ROWS).logits
        kind.restore(model, {name: tensor + 0.1 * name.endswith("raw") for name, tensor in state.items()})
        assert not torch.equal(model(ROWS).logits, before)
        kind.restore(model, state)
        assert torch.equal(model(ROWS).logits, before)


def test_dropout_acts_in_training_only() -> None:
    options = Reft(rank=2, dropout=0.5)
    model = trained(options)
    assert torch.equal(model(ROWS).logits, model(ROWS).logits)
    model.train()
    assert not torch.equal(model(ROWS).logits, model(ROWS).logits)


@pytest.mark.parametrize(("layers", "n_tensors"), [("all", 6), ((1,), 3), ((1, 0, 1), 6)])
def test_the_named_layers_are_edited(layers: Any, n_tensors: int) -> None:
    model = make_attached(Reft(rank=2, layers=layers))
    assert len(kind_of(Reft()).parameters(model)) == n_tensors


def test_layers_the_base_lacks_and_too_high_a_rank_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"\[2, 5\] does not fit a base of 2 layers. Use 0 to 1"):
        make_attached(Reft(rank=2, layers=(0, 2, 5)))
    with pytest.raises(AdapterError, match="at most 32"):
        make_attached(Reft(rank=33))


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain, checkpointed = make_attached(Reft(rank=2)).train(), make_attached(Reft(rank=2)).train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        model(input_ids=ROWS, labels=ROWS, use_cache=False).loss.backward()
    pairs = [
        (left.grad, right.grad)
        for left, right in zip(plain.parameters(), checkpointed.parameters(), strict=True)
        if left.requires_grad
    ]
    assert len(pairs) == 6
    assert all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**LLAMA),
        GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4),
        GPTNeoXConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    ],
    ids=["llama", "gpt2", "gpt_neox"],
)
def test_decoder_layers_are_found_by_structure(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    assert len(anatomy.decoder_layers(model)) == 2
    kind_of(Reft()).attach(model, Reft(rank=2), seed=0)
    assert model(ROWS).logits.shape == (2, 11, 96)


def test_no_or_two_lists_of_layers_is_an_error_that_says_so() -> None:
    base = make_base()
    base.model.more = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    with pytest.raises(AdapterError, match=r"cannot tell which modules are its 2 decoder layers \(layers, more\)"):
        anatomy.decoder_layers(base)
    base.config.num_hidden_layers = 7
    with pytest.raises(AdapterError, match="none fit"):
        anatomy.decoder_layers(base)


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    kind_of(Reft()).save(trained(Reft(rank=2, layers=(1,))), tmp_path, base="spoken-mini", base_hash="abc")
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config == {
        "kind": "reft", "version": 1, "rank": 2, "layers": [1], "hidden": 32, "n_layers": 2, "dropout": 0.0,
        "base": "spoken-mini", "base_hash": "abc",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "format is version 2; this Maltu reads 1"),
        ({"rank": "4"}, "rank missing or of the wrong type"),
        ({"rank": True}, "rank missing or of the wrong type"),
        ({"layers": [9]}, "does not fit a base of 2 layers"),
        ({"rank": 3}, "was made for another base"),
        ({"kind": "embedding"}, "holds an adapter of kind embedding, not reft"),
    ],
)
def test_a_config_that_was_changed_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    kind = kind_of(Reft())
    kind.save(trained(Reft(rank=2)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(AdapterError, match=says):
        kind.load(make_base(), tmp_path)


def test_a_second_one_and_none_at_all_are_errors(tmp_path: Path) -> None:
    model = make_attached(Reft(rank=2))
    with pytest.raises(AdapterError, match="already has a reft adapter"):
        kind_of(Reft()).attach(model, Reft(rank=2), seed=0)
    with pytest.raises(AdapterError, match="has no reft adapter"):
        kind_of(Reft()).parameters(make_base())
    kind_of(Reft()).save(model, tmp_path)
    assert kind_in_folder(tmp_path).name == "reft"
