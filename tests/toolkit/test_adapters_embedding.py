"""Kind embedding: which tokens learn, and a head that stays what it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from toolkit.adapters import anatomy
from toolkit.adapters.kinds import kind_in_folder, kind_of
from toolkit.errors import AdapterError
from toolkit.recipe.model import Embedding

LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
ROWS = torch.tensor([[5, 6, 7, 8, 9, 10]])
OTHERS = torch.tensor([[50, 51, 52, 53]])
KIND = kind_of(Embedding())


def make_base(**changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, **changes})).eval()


def trained(base: Any, token_ids: Any = (5, 6, 7, 8)) -> Any:
    model: Any = KIND.attach(base, Embedding(), seed=0, token_ids=token_ids)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-2)
    for _ in range(3):
        model(input_ids=ROWS, labels=ROWS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_tokens_that_were_not_given_keep_the_bases_answers() -> None:
    model = trained(make_base())
    assert torch.equal(model(OTHERS).logits, make_base()(OTHERS).logits)
    assert not torch.equal(model(ROWS).logits, make_base()(ROWS).logits)


def test_the_delta_is_as_large_as_the_tokens_given_and_the_vocabulary_without_them() -> None:
    assert KIND.parameters(trained(make_base(), (9, 5, 5, 7)))["token_ids"].tolist() == [5, 7, 9]
    assert KIND.parameters(trained(make_base(), None))["delta"].shape == (96, 32)


@pytest.mark.parametrize("token_ids", [[], [96], [-1, 5]])
def test_token_ids_of_another_vocabulary_are_refused(token_ids: list[int]) -> None:
    with pytest.raises(AdapterError, match="do not fit a vocabulary of 96"):
        KIND.attach(make_base(), Embedding(), seed=0, token_ids=token_ids)


@pytest.mark.parametrize("is_tied", [True, False])
def test_merging_unties_the_head_and_leaves_it_what_it_was(is_tied: bool, tmp_path: Path) -> None:
    base = make_base(tie_word_embeddings=is_tied)
    head = base.lm_head.weight.detach().clone()
    model = trained(base)
    before = model(ROWS).logits.detach()
    merged: Any = KIND.merge(model)
    assert torch.equal(merged.lm_head.weight, head)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    torch.testing.assert_close(again(ROWS).logits, before, rtol=0, atol=1e-6)


def test_a_base_that_scales_its_embeddings_merges_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(Gemma3TextConfig(**LLAMA, head_dim=8)).eval()
    model = trained(base)
    before = model(ROWS).logits.detach()
    merged: Any = KIND.merge(model)
    merged.save_pretrained(tmp_path)
    after = AutoModelForCausalLM.from_pretrained(tmp_path)(ROWS).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_a_base_that_changes_its_embeddings_otherwise_is_not_merged() -> None:
    base = make_base()
    model = trained(base)
    table = anatomy.input_embeddings(base)
    table.register_forward_hook(lambda module, inputs, output: output.tanh() * 3, prepend=True)
    with pytest.raises(AdapterError, match="changes its embeddings on the way out"):
        KIND.merge(model)


def test_the_state_of_other_tokens_is_refused() -> None:
    with pytest.raises(AdapterError, match="for other tokens"):
        KIND.restore(trained(make_base(), (5, 6)), KIND.state(trained(make_base(), (5, 7))))


def test_token_ids_that_were_changed_on_disk_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    KIND.save(trained(make_base()), tmp_path)
    file = tmp_path / "adapter.safetensors"
    for ids in ([5, 6, 7, 96], [5, 5, 6, 7]):
        save_file(load_file(file) | {"token_ids": torch.tensor(ids)}, file)
        with pytest.raises(AdapterError, match="token ids do not fit"):
            kind_in_folder(tmp_path).load(make_base(), tmp_path)


def test_a_second_one_and_none_at_all_are_errors() -> None:
    model = trained(make_base())
    with pytest.raises(AdapterError, match="already has an embedding adapter"):
        KIND.attach(model, Embedding(), seed=0)
    with pytest.raises(AdapterError, match="has no embedding adapter"):
        KIND.merge(make_base())
