"""A batch equals its rows alone, noise belongs to a row, and the sampler keeps what it is told to keep."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.mini_world import base as spoken_mini
from tests.mini_world import base_folder, tokenizer
from toolkit.adapters.opened import measuring
from toolkit.errors import InputError, MaltuError
from toolkit.generate import Sampling, end_ids, generate, stream

GREEDY = Sampling(temperature=0.0, max_tokens=12)
PROMPTS = [
    "오늘 뭐 먹지?",
    "안녕",
    "I missed the bus by two seconds and it is raining. What now?",
    "심심해 죽겠다 진짜로",
]


def tiny_llama() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8192, num_key_value_heads=2, **shape)).eval()


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()


def tiny_gemma() -> Any:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(vocab_size=8192, num_key_value_heads=1, sliding_window=4, layer_types=layers, **shape)
    return Gemma3ForCausalLM(config).eval()


def ids_of(text: str) -> list[int]:
    return list(tokenizer()(f"<|user|>{text}<|end|><|assistant|>", add_special_tokens=False)["input_ids"])


def prompts() -> list[list[int]]:
    return [ids_of(text) for text in PROMPTS]


MODELS = pytest.mark.parametrize("make", [spoken_mini, tiny_llama, tiny_gpt2, tiny_gemma])


@MODELS
def test_a_left_padded_row_has_the_logits_it_has_alone(make: Callable[[], Any]) -> None:
    ids, n_pads = prompts()[0], 7
    with measuring(make()) as opened:
        alone = opened.logits(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), opened.start(1))
        mask = torch.tensor([[0] * n_pads + [1] * len(ids)])
        padded = opened.logits(torch.tensor([[0] * n_pads + ids]), mask, opened.start(1))
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


@MODELS
def test_a_batch_answers_like_its_rows_alone(make: Callable[[], Any]) -> None:
    model = make()
    together = generate(model, tokenizer(), prompts(), GREEDY)
    alone = [generate(model, tokenizer(), [prompt], GREEDY)[0] for prompt in prompts()]
    assert together == alone


@MODELS
def test_greedy_equals_generate_of_transformers(make: Callable[[], Any]) -> None:
    model, ids = make(), prompts()[2]
    ends = sorted(end_ids(model, tokenizer()))
    theirs = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    ours = generate(model, tokenizer(), [ids], GREEDY)[0]
    assert list(ours.ids) == [token for token in theirs if token not in ends]


def test_small_batches_give_the_answers_of_one_large_batch() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.95, max_tokens=12, seed=3)
    large = generate(spoken_mini(), tokenizer(), prompts(), sampling)
    assert generate(spoken_mini(), tokenizer(), prompts(), sampling, batch_tokens=1) == large


def test_a_sampled_answer_does_not_depend_on_its_neighbours() -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=12, seed=11)
    first, *_ = generate(spoken_mini(), tokenizer(), prompts(), sampling)
    assert generate(spoken_mini(), tokenizer(), [prompts()[0], prompts()[2]], sampling)[0] == first


def test_another_seed_gives_another_answer() -> None:
    answers = {
        generate(spoken_mini(), tokenizer(), prompts()[:1], Sampling(temperature=1.0, max_tokens=12, seed=seed))[0].ids
        for seed in range(4)
    }
    assert len(answers) > 1


def test_the_same_prompt_twice_in_a_batch_gives_two_draws() -> None:
    sampling = Sampling(temperature=1.5, top_p=1.0, max_tokens=12, seed=1)
    one, two = generate(spoken_mini(), tokenizer(), [prompts()[0]] * 2, sampling)
    assert one.ids != two.ids


@pytest.mark.parametrize("make", [spoken_mini, tiny_llama])
def test_streamed_pieces_join_to_the_answer_of_generate(make: Callable[[], Any]) -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=40, seed=5)
    model, pieces = make(), []
    steps = stream(model, tokenizer(), prompts()[0], sampling)
    while True:
        try:
            pieces.append(next(steps))
        except StopIteration as over:
            answer = over.value
            break
    assert answer == generate(model, tokenizer(), [prompts()[0]], sampling)[0]
    assert "".join(pieces) == answer.text and all(pieces)


def test_a_stream_cut_by_length_still_shows_what_was_held_back() -> None:
    free = generate(spoken_mini(), tokenizer(), prompts()[2:3], Sampling(temperature=0.0, max_tokens=5))[0]
    sampling = Sampling(temperature=0.0, max_tokens=5, stop=(free.text[-1] + "끝",))
    pieces = list(stream(spoken_mini(), tokenizer(), prompts()[2], sampling))
    assert free.finish == "length" and "".join(pieces) == free.text


def test_a_cancelled_stream_ends_before_the_next_token() -> None:
    asked = itertools.count()
    sampling = Sampling(temperature=0.0, max_tokens=40)
    steps = stream(
        tiny_llama(), tokenizer(), prompts()[0], sampling, is_cancelled=lambda: next(asked) >= 3, ends=frozenset()
    )
    with pytest.raises(StopIteration) as over:
        while True:
            next(steps)
    assert (len(over.value.value.ids), over.value.value.finish) == (3, "cancelled")


def test_an_end_token_stops_an_answer_and_is_not_part_of_it() -> None:
    free = generate(tiny_llama(), tokenizer(), prompts()[:1], GREEDY, ends=frozenset())[0]
    new = next(place for place in range(1, 12) if free.ids[place] not in free.ids[:place])
    ended = generate(tiny_llama(), tokenizer(), prompts()[:1], GREEDY, ends={free.ids[new]})[0]
    assert (ended.ids, ended.finish, free.finish) == (free.ids[:new], "stop", "length")


def test_max_tokens_ends_an_answer_as_length() -> None:
    answer = generate(
        tiny_llama(), tokenizer(), prompts()[:1], Sampling(temperature=0.0, max_tokens=3), ends=frozenset()
    )[0]
    assert (len(answer.ids), answer.finish, answer.n_prompt) == (3, "length", len(prompts()[0]))


def test_an_answer_ends_where_the_context_of_the_base_ends() -> None:
    prompt = (prompts()[0] * 20)[:60]
    answer = generate(tiny_gpt2(), tokenizer(), [prompt], Sampling(temperature=0.0), ends=frozenset())[0]
    assert (len(answer.ids), answer.finish) == (4, "length")


def test_prompts_that_cannot_be_answered_are_all_named() -> None:
    with pytest.raises(InputError, match=r"2 problems(.|\n)*prompt 0(.|\n)*prompt 2: has 64 tokens; the base holds 64"):
        generate(tiny_gpt2(), tokenizer(), [[], [5], [5] * 64], GREEDY)


def test_a_stop_string_cuts_the_text_before_itself() -> None:
    free = generate(spoken_mini(), tokenizer(), prompts()[2:3], Sampling(temperature=0.0, max_tokens=12))[0]
    stop = free.text[3:6]
    cut = generate(spoken_mini(), tokenizer(), prompts()[2:3], Sampling(temperature=0.0, max_tokens=12, stop=(stop,)))[
        0
    ]
    assert (cut.text, cut.finish) == (free.text[: free.text.find(stop)], "stop")


def test_logits_that_are_not_numbers_are_an_error() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(MaltuError, match="not a number"):
        generate(model, tokenizer(), prompts()[:1], GREEDY)


def test_a_training_model_is_measured_without_dropout_and_trains_on() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.9)).train()
    first, second = (generate(model, tokenizer(), prompts()[:1], GREEDY)[0].ids for _ in range(2))
    assert first == second and model.training


def test_forward_hooks_act_on_every_step() -> None:
    model = tiny_llama()
    plain = generate(model, tokenizer(), prompts(), GREEDY)
    shift = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 3
    handle = model.model.layers[0].register_forward_hook(lambda module, given, out: out + shift)
    hooked, alone = generate(model, tokenizer(), prompts(), GREEDY), generate(model, tokenizer(), prompts()[:1], GREEDY)
    handle.remove()
    assert hooked != plain and hooked[0] == alone[0]


def test_end_ids_hold_the_eos_and_what_the_template_puts_after_an_answer() -> None:
    other = AutoTokenizer.from_pretrained(base_folder())
    other.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|system|>\n{% endfor %}"
    assert end_ids(spoken_mini(), tokenizer()) == {4} and end_ids(spoken_mini(), other) == {4, 1}


def test_a_repetition_penalty_reaches_the_prompt_and_the_answer() -> None:
    plain = generate(spoken_mini(), tokenizer(), prompts(), GREEDY, ends=frozenset())
    sampling = Sampling(temperature=0.0, max_tokens=12, repetition_penalty=50.0)
    for row, answer in enumerate(generate(spoken_mini(), tokenizer(), prompts(), sampling, ends=frozenset())):
        assert len(set(answer.ids)) == 12 and not set(answer.ids) & set(prompts()[row])
        assert answer.ids != plain[row].ids


def test_penalties_of_the_answer_and_a_bias_reach_generate_and_stream() -> None:
    plain = generate(spoken_mini(), tokenizer(), prompts()[:1], GREEDY, ends=frozenset())[0]
    unlike = Sampling(temperature=0.0, max_tokens=12, logit_bias={plain.ids[0]: -100.0}, frequency_penalty=2.0)
    said = generate(spoken_mini(), tokenizer(), prompts(), unlike, ends=frozenset())[0]
    assert plain.ids[0] not in said.ids
    assert "".join(stream(spoken_mini(), tokenizer(), prompts()[0], unlike, ends=frozenset())) == said.text
    loud = Sampling(temperature=0.0, max_tokens=12, logit_bias={77: 100.0})
    assert generate(spoken_mini(), tokenizer(), prompts()[:1], loud, ends=frozenset())[0].ids == (77,) * 12


def test_a_bias_on_a_token_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="no token 8192"):
        generate(spoken_mini(), tokenizer(), prompts(), Sampling(logit_bias={8192: 1.0}))
