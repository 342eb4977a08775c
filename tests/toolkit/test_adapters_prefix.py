"""Kind prefix, and the model that counts positions for it: what callers may pass, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig

from toolkit.adapters.kinds import kind_in_folder, kind_of
from toolkit.errors import AdapterError
from toolkit.recipe.model import PeftKind, Prefix

LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
ROWS = torch.randint(5, 96, (2, 11), generator=torch.Generator().manual_seed(1))
ALL = torch.ones_like(ROWS)
LEARNED = {
    "prefix": Prefix(tokens=4),
    "prompt_tuning": PeftKind(kind="prompt_tuning", options={"num_virtual_tokens": 4}),
    "p_tuning": PeftKind(kind="p_tuning", options={"num_virtual_tokens": 4}),
}


class Words:
    """A tokenizer of one token a word."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [5 + len(word) for word in text.split()]}


def make_base(config: Any = None) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config or LlamaConfig(**LLAMA)).eval()


def attach(options: Any, **more: Any) -> Any:
    return kind_of(options).attach(make_base(), options, seed=0, **more)


@pytest.mark.parametrize("options", LEARNED.values(), ids=LEARNED.keys())
class TestCalledLikeTheBase:
    def test_left_padding_without_positions_is_right(self, options: Any) -> None:
        model = attach(options)
        rows = torch.cat([torch.zeros(2, 3, dtype=torch.long), ROWS], 1)
        padded = model(input_ids=rows, attention_mask=(rows > 0).long()).logits[:, 3:]
        torch.testing.assert_close(padded, model(input_ids=ROWS).logits, rtol=0, atol=2e-6)

    def test_an_empty_cache_is_filled_and_given_back(self, options: Any) -> None:
        model, cache = attach(options), DynamicCache()
        answer = model(input_ids=ROWS, past_key_values=cache, use_cache=True)
        assert answer.past_key_values is cache
        assert cache.get_seq_length() == 4 + 11
        torch.testing.assert_close(answer.logits, model(input_ids=ROWS).logits, rtol=0, atol=2e-6)

    def test_one_token_at_a_time_equals_one_pass(self, options: Any) -> None:
        model, cache, seen = attach(options), None, []
        for i in range(ROWS.shape[1]):
            answer = model(
                input_ids=ROWS[:, i : i + 1], attention_mask=ALL[:, : i + 1], past_key_values=cache, use_cache=True
            )
            cache = answer.past_key_values
            seen.append(answer.logits)
        torch.testing.assert_close(torch.cat(seen, 1), model(input_ids=ROWS).logits, rtol=0, atol=2e-6)

    def test_the_loss_is_that_of_the_rows_own_tokens(self, options: Any) -> None:
        model = attach(options)
        answer = model(input_ids=ROWS, attention_mask=ALL, labels=ROWS)
        by_hand = torch.nn.functional.cross_entropy(answer.logits[:, :-1].flatten(0, 1), ROWS[:, 1:].flatten())
        assert answer.logits.shape == (2, 11, 96)
        # Prompt tuning's last learned position also predicts the first token.
        tolerance = 1e-5 if options.kind == "prefix" else 1.0
        assert abs(answer.loss.item() - by_hand.item()) < tolerance

    def test_packed_rows_are_refused(self, options: Any) -> None:
        positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]]).expand(2, -1)
        with pytest.raises(AdapterError, match="cannot learn from packed rows"):
            attach(options)(input_ids=ROWS, position_ids=positions)

    def test_activation_checkpointing_is_refused_before_and_after(self, options: Any) -> None:
        base = make_base()
        base.activation_checkpointing_enable()
        with pytest.raises(AdapterError, match="cannot use activation checkpointing"):
            kind_of(options).attach(base, options, seed=0)
        model = attach(options)
        with pytest.raises(AdapterError, match="cannot use activation checkpointing"):
            model.gradient_checkpointing_enable()
        with pytest.raises(AdapterError, match="cannot use activation checkpointing"):
            model.activation_checkpointing_enable()
        model.get_base_model().activation_checkpointing_enable()
        with pytest.raises(AdapterError, match="cannot use activation checkpointing"):
            model.train()(input_ids=ROWS)

    def test_left_padding_past_a_sliding_window_is_refused(self, options: Any) -> None:
        config = MistralConfig(**LLAMA, sliding_window=12)
        model = kind_of(options).attach(make_base(config), options, seed=0)
        rows = torch.cat([torch.zeros(2, 3, dtype=torch.long), ROWS], 1)
        model(input_ids=ROWS)
        model(input_ids=rows[:, :8], attention_mask=(rows > 0).long()[:, :8])
        with pytest.raises(AdapterError, match="sliding window of 12"):
            model(input_ids=rows, attention_mask=(rows > 0).long())

    def test_a_mask_of_the_wrong_length_is_refused(self, options: Any) -> None:
        with pytest.raises(AdapterError, match="need one number for each"):
            attach(options)(input_ids=ROWS, attention_mask=ALL[:, :7])

    def test_another_depth_is_refused(self, options: Any, tmp_path: Path) -> None:
        kind_of(options).save(attach(options), tmp_path)
        with pytest.raises(AdapterError, match="made for another base"):
            kind_in_folder(tmp_path).load(make_base(LlamaConfig(**{**LLAMA, "num_hidden_layers": 3})), tmp_path)


def test_a_prefix_from_a_text_answers_as_if_the_text_stood_there() -> None:
    text = "나는 오늘 집에서 쉬었어"  # four words, so four tokens
    model = attach(Prefix(tokens=4, init_text=text), tokenizer=Words())
    ids = torch.tensor([Words()(text, True)["input_ids"]]).expand(2, -1)
    with_text = make_base()(torch.cat([ids, ROWS], 1)).logits[:, 4:]
    torch.testing.assert_close(model(input_ids=ROWS).logits, with_text, rtol=0, atol=2e-6)


def test_a_short_text_is_repeated() -> None:
    model = attach(Prefix(tokens=6, init_text="야 뭐"), tokenizer=Words())
    ids = torch.tensor([[6, 6, 6, 6, 6, 6]]).expand(2, -1)
    with_text = make_base()(torch.cat([ids, ROWS], 1)).logits[:, 6:]
    torch.testing.assert_close(model(input_ids=ROWS).logits, with_text, rtol=0, atol=2e-6)


def test_a_text_needs_the_tokenizer_and_no_projection() -> None:
    with pytest.raises(AdapterError, match="needs the base's tokenizer"):
        attach(Prefix(tokens=4, init_text="안녕"))
    both = Prefix.model_construct(kind="prefix", tokens=4, init_text="안녕", projection=True)
    with pytest.raises(AdapterError, match="cannot start from a text"):
        attach(both, tokenizer=Words())


def test_layers_without_attention_are_refused() -> None:
    base = make_base()
    base.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(AdapterError, match="also has linear_attention"):
        kind_of(Prefix()).attach(base, Prefix(), seed=0)
