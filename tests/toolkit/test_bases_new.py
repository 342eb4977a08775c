"""A base from scratch: the tokenizer, the model, the optimizer and the windows."""

import copy
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from toolkit.bases.new import (
    SPECIAL_TOKENS,
    MuonAdamW,
    build_muon,
    intermediate_size,
    new_model,
    optimizer_groups,
    train_tokenizer,
    windows,
)
from toolkit.errors import BaseError
from toolkit.recipe.model import NewShape
from toolkit.shipped import shipped

TEXTS = [
    "오늘 뭐 먹지? 떡볶이 어때?",
    "나 오늘 진짜 피곤해. 그래도 밥은 먹자!",
    "What are you up to tonight?",
    "Not much, I was thinking of making dinner.",
] * 3
SHAPE = NewShape(hidden=32, layers=2, heads=2, vocab=320, context=64)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 320, context=64)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return new_model(SHAPE, tokenizer, seed=0)


def take_steps(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        ids = torch.randint(5, 300, (2, 16), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights_of(model: LlamaForCausalLM) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_special_tokens_take_the_first_ids_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 0, 4)


def test_the_vocabulary_has_the_size_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 320


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_decomposed_hangul_costs_no_more_than_composed(tokenizer: PreTrainedTokenizerFast) -> None:
    composed = "오늘 뭐 먹지?"
    assert tokenizer.encode(unicodedata.normalize("NFD", composed)) == tokenizer.encode(composed)


def test_encoding_adds_nothing_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.encode("밥") == tokenizer.encode("밥", add_special_tokens=False)


def test_the_template_writes_turns_with_our_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "밥 먹었어?"}, {"role": "assistant", "content": "응!"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|user|>밥 먹었어?<|end|><|assistant|>응!<|end|>"


def test_a_saved_tokenizer_opens_as_it_was(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "오늘 뭐 먹지? What's up"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == tokenizer.chat_template
    assert again.model_max_length == 64


@pytest.mark.slow
def test_the_same_texts_give_the_same_tokenizer_in_another_process(tokenizer: PreTrainedTokenizerFast) -> None:
    code = (
        "import json, sys; from toolkit.bases.new import train_tokenizer;"
        "print(train_tokenizer(json.loads(sys.argv[1]), 320, context=64).backend_tokenizer.to_str())"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, json.dumps(TEXTS)], capture_output=True, text=True, check=True, cwd=Path.cwd()
    ).stdout
    assert json.loads(said)["model"] == json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def test_a_tokenizer_without_text_is_refused() -> None:
    with pytest.raises(BaseError, match=r"data\.train"):
        train_tokenizer([], 400)


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(BaseError, match="300 or more"):
        train_tokenizer(TEXTS, 261)


def test_a_new_model_has_the_shape_asked_for(model: LlamaForCausalLM) -> None:
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 2)
    assert (config.vocab_size, config.max_position_embeddings) == (320, 64)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 4, 0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_new_model_knows_nothing_yet(model: LlamaForCausalLM) -> None:
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(torch.log(torch.tensor(320.0)).item(), abs=0.3)


def test_the_seed_alone_decides_the_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    first = weights_of(new_model(SHAPE, tokenizer, seed=7))
    torch.manual_seed(2)
    assert equal(first, weights_of(new_model(SHAPE, tokenizer, seed=7)))
    assert not equal(first, weights_of(new_model(SHAPE, tokenizer, seed=8)))


def test_making_a_model_leaves_the_global_random_state_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.get_rng_state()
    new_model(SHAPE, tokenizer, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_width_that_does_not_divide_is_refused_with_one_that_does(tokenizer: PreTrainedTokenizerFast) -> None:
    # The recipe refuses this too; a shape may also be made without a recipe.
    shape = NewShape.model_construct(hidden=33, layers=1, heads=2, vocab=320, context=64)
    with pytest.raises(BaseError, match=r"hidden: 32"):
        new_model(shape, tokenizer, seed=0)


@pytest.mark.parametrize(("hidden", "wide"), [(16, 64), (192, 512), (224, 576), (256, 704), (384, 1024)])
def test_the_inner_width_is_a_multiple_of_64(hidden: int, wide: int) -> None:
    assert intermediate_size(hidden) == wide


def test_every_parameter_is_in_one_group_and_tables_are_not_muons(model: LlamaForCausalLM) -> None:
    muon, adamw = optimizer_groups(model, 0.1)
    ids = [id(p) for p in [*muon["params"], *adamw["params"]]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert len(muon["params"]) == 2 * 7
    assert id(model.get_input_embeddings().weight) not in {id(p) for p in muon["params"]}
    assert (muon["weight_decay"], adamw["weight_decay"]) == (0.1, 0.0)


def test_an_untied_head_is_not_muons(tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model(SHAPE, tokenizer, seed=0)
    head = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.get_output_embeddings().weight = head
    muon, adamw = optimizer_groups(model, 0.1)
    assert id(head) in {id(p) for p in adamw["params"]}
    assert len(muon["params"]) == 2 * 7


def test_frozen_parameters_are_in_no_group(model: LlamaForCausalLM) -> None:
    model.get_input_embeddings().weight.requires_grad_(False)
    groups = optimizer_groups(model, 0.0)
    assert id(model.get_input_embeddings().weight) not in {id(p) for group in groups for p in group["params"]}


def test_a_step_equals_the_two_optimizers_stepped_apart(model: LlamaForCausalLM) -> None:
    other = copy.deepcopy(model)
    take_steps(model, build_muon(model, 1e-2, 0.1), range(3))
    muon, adamw = optimizer_groups(other, 0.1)
    apart = [
        torch.optim.Muon(muon["params"], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw["params"], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for seed in range(3):
        ids = torch.randint(5, 300, (2, 16), generator=torch.Generator().manual_seed(seed))
        other(input_ids=ids, labels=ids).loss.backward()
        for half in apart:
            half.step()
            half.zero_grad()
    assert equal(weights_of(model), weights_of(other))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_schedule_moves_both_halves(model: LlamaForCausalLM, kind: str) -> None:
    optimizer = build_muon(model, 1e-2, 0.0)
    LambdaLR(optimizer, lambda _: 0.0)
    chosen = [p for group in optimizer.param_groups if group["kind"] == kind for p in group["params"]]
    before = [p.detach().clone() for p in chosen]
    take_steps(model, optimizer, range(1))
    assert equal(before, [p.detach() for p in chosen])


def test_saved_and_loaded_it_goes_on_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    optimizer = build_muon(model, 1e-2, 0.1)
    take_steps(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "kept.pt")
    take_steps(model, optimizer, range(3, 6))

    kept = torch.load(tmp_path / "kept.pt", weights_only=True)
    again = new_model(SHAPE, tokenizer, seed=9)
    again.load_state_dict(kept["model"])
    resumed = build_muon(again, 5e-1, 0.0)
    resumed.load_state_dict(kept["optimizer"])
    take_steps(again, resumed, range(3, 6))
    assert equal(weights_of(model), weights_of(again))


def test_a_schedule_still_moves_a_loaded_optimizer(model: LlamaForCausalLM) -> None:
    optimizer = build_muon(model, 1e-2, 0.0)
    take_steps(model, optimizer, range(1))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights_of(model)
    take_steps(model, optimizer, range(1, 2))
    assert equal(before, weights_of(model))


def test_a_copied_optimizer_still_steps(model: LlamaForCausalLM) -> None:
    other, optimizer = copy.deepcopy((model, build_muon(model, 1e-2, 0.0)))
    before = weights_of(other)
    take_steps(other, optimizer, range(2))
    assert not any(torch.equal(x, y) for x, y in zip(before, other.parameters(), strict=True))


def test_a_group_that_no_half_would_train_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="kind 'muon' or 'adamw'"):
        MuonAdamW([{"params": list(model.parameters())}], 1e-2)


def test_a_group_added_later_learns(model: LlamaForCausalLM) -> None:
    muon, adamw = optimizer_groups(model, 0.0)
    optimizer = MuonAdamW([adamw], 1e-2)
    optimizer.add_param_group(muon)
    before = [p.detach().clone() for p in muon["params"]]
    take_steps(model, optimizer, range(2))
    assert not any(torch.equal(x, y) for x, y in zip(before, muon["params"], strict=True))


def test_transformers_trainer_takes_it_and_resumes_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ids = torch.randint(5, 300, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def train(stop_at: int | None, resume: str | None) -> list[torch.Tensor]:
        model = new_model(SHAPE, tokenizer, seed=0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2, use_cpu=True,
            save_steps=2, logging_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, optimizers=(build_muon(model, 1e-2, 0.1), None)
        )
        trainer.train(resume_from_checkpoint=resume)
        return weights_of(model)

    whole = train(None, None)
    assert equal(whole, train(None, str(tmp_path / "checkpoint-2")))


def test_a_few_steps_lower_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model(SHAPE, tokenizer, seed=0)
    rows = list(windows([tokenizer.encode(text) for text in TEXTS], 16, 0))
    ids = torch.tensor([row for row in rows if len(row) == 16])
    optimizer, losses = build_muon(model, 1e-2, 0.0), []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@given(rows=st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=12), length=st.integers(2, 10))
def test_windows_hold_every_token_once_and_in_order(rows: list[list[int]], length: int) -> None:
    cut = list(windows(rows, length, 0))
    assert [i for window in cut for i in window] == [i for row in rows if row for i in [0, *row]]
    assert all(len(window) == length for window in cut[:-1])


def test_a_row_that_opens_a_document_itself_is_not_opened_twice() -> None:
    assert list(windows([[0, 7, 8], [9]], 16, 0)) == [[0, 7, 8, 0, 9]]


def test_a_window_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        next(windows([[1, 2]], 1, 0))


def test_the_shipped_base_has_the_same_special_tokens_and_template(tokenizer: PreTrainedTokenizerFast) -> None:
    folder = shipped("base/spoken-mini")
    if not folder.is_dir():
        pytest.skip("data/base/spoken-mini is not here")
    ours = AutoTokenizer.from_pretrained(folder)
    assert ours.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert ours.chat_template == tokenizer.chat_template
