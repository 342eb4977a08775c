"""Scores equal a plain forward pass, whatever shares a batch or a prompt with them."""

import functools
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from toolkit import score as room
from toolkit.errors import InputError
from toolkit.score import IGNORED, score, supervised_log_likelihoods

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@functools.cache
def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, **SHAPE)).eval()


@functools.cache
def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=40)).eval()


@functools.cache
def gemma() -> Any:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97, head_dim=16, num_key_value_heads=1, sliding_window=4, final_logit_softcapping=2.0, **SHAPE
    )
    return Gemma3ForCausalLM(config).eval()


MODELS = pytest.mark.parametrize("model_of", [llama, gpt2, gemma])


def plainly(model: Any, prompt: list[int], continuation: list[int]) -> list[float]:
    ids = torch.tensor([prompt + continuation])
    with torch.no_grad():
        logs = model(ids).logits.float().log_softmax(-1)
    return [logs[0, len(prompt) - 1 + i, token].item() for i, token in enumerate(continuation)]


def rows() -> list[tuple[list[int], list[int]]]:
    draw = torch.Generator().manual_seed(3)
    lengths = [(3, 5), (9, 1), (1, 2), (12, 7), (4, 4), (2, 1)]
    return [
        (torch.randint(0, 97, (n,), generator=draw).tolist(), torch.randint(0, 97, (m,), generator=draw).tolist())
        for n, m in lengths
    ]


def assert_close(found: list[list[float]], wanted: list[list[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-5)


@MODELS
def test_continuations_score_as_in_a_plain_forward(model_of: Any) -> None:
    assert_close(score(model_of(), rows()), [plainly(model_of(), *row) for row in rows()])


@MODELS
@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_a_shared_prompt_changes_nothing(model_of: Any, batch_tokens: int) -> None:
    labels = [[5], [6, 7, 8], [5, 9], [1, 2, 3, 4]]
    mixed = [(prompt, label) for label in labels for prompt in ([3, 1, 4, 1, 5], [9, 2], [7], [6] * 11)] + rows()
    found = score(model_of(), mixed, batch_tokens=batch_tokens)
    assert_close(found, [plainly(model_of(), *row) for row in mixed])


@MODELS
def test_supervised_positions_score_as_in_a_plain_forward(model_of: Any) -> None:
    ids, draw = [5, 6, 7, 8, 9, 10, 11, 12], torch.Generator().manual_seed(1)
    other = torch.randint(0, 97, (15,), generator=draw).tolist()
    supervised = [(ids, [1, 2, 7]), (other, [3, 14]), (ids[:3], [])]
    labelled = [(row, [t if i in at else IGNORED for i, t in enumerate(row)]) for row, at in supervised]
    wanted = [[plainly(model_of(), row[:i], row[i:])[0] for i in at] for row, at in supervised]
    assert_close(supervised_log_likelihoods(model_of(), labelled), wanted)


def test_only_supervised_positions_go_through_the_head() -> None:
    widths: list[int] = []
    handle = llama().lm_head.register_forward_hook(lambda module, given, out: widths.append(out[..., 0].numel()))
    supervised_log_likelihoods(llama(), [([5] * 30, [IGNORED] * 28 + [5, 5]), ([6] * 20, [IGNORED] * 19 + [6])])
    handle.remove()
    assert widths == [3]


def test_a_shared_prompt_is_computed_once() -> None:
    seen: list[int] = []
    handle = llama().model.register_forward_hook(
        lambda module, given, kwargs, out: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    score(llama(), [([5] * 30, [label]) for label in range(8)])
    handle.remove()
    assert sum(seen) == 29 + 8


def test_the_logits_of_a_batch_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = score(llama(), rows())
    monkeypatch.setattr(room, "_HEAD_NUMBERS", 97 * 6)
    widths: list[int] = []
    handle = llama().lm_head.register_forward_hook(lambda module, given, out: widths.append(out[..., 0].numel()))
    found = score(llama(), rows())
    handle.remove()
    assert max(widths) <= 7 and len(widths) > 2
    assert_close(found, wanted)


def test_an_empty_continuation_scores_nothing() -> None:
    assert score(llama(), [([5, 6], []), ([5, 6], [7]), ([5, 6], [8])])[0] == []


def test_no_rows_score_nothing() -> None:
    assert score(llama(), []) == [] == supervised_log_likelihoods(llama(), [])


def test_rows_that_cannot_be_scored_are_all_named() -> None:
    with pytest.raises(InputError, match=r"row 0: nothing stands(.|\n)*row 2: has 41 tokens; the base holds 40"):
        score(gpt2(), [([], [5]), ([5], [5]), ([5] * 40, [6])])
    with pytest.raises(InputError, match="row 0: nothing stands"):
        supervised_log_likelihoods(gpt2(), [([5, 6], [5, 6])])


def test_a_training_model_is_scored_without_dropout_and_trains_on() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.9)).train()
    assert score(model, rows()) == score(model, rows()) and model.training


def test_scoring_keeps_no_gradients() -> None:
    model = llama()
    score(model, rows())
    assert all(parameter.grad is None for parameter in model.parameters())
