"""Mixtures: their numbers, what the sampler makes of them, and what has no meaning."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.combined_world import GREEDY, PROMPTS, words
from tests.stacked_world import World, make_base, off, padded, some_rows
from toolkit.combine.mix import Mix, Mixture, mixed, mixed_logits
from toolkit.combine.rows import answering
from toolkit.errors import InputError, MaltuError
from toolkit.generate import Sampling, generate, stream
from toolkit.recipe.model import Lora
from toolkit.stack.adapter import new_adapter

NEVER = -math.inf
TRIO = ("lora", "prefix-2", "reft")
SAMPLED = Sampling(temperature=1.3, top_p=0.95, max_tokens=9, seed=11)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama") / "adapters")


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestNumbers:
    def test_logprob_is_the_weighted_average_of_log_probabilities_renormalised(self) -> None:
        given = logits(3, 50)
        averaged = torch.tensor([0.5, 0.2, 0.3]) @ given.log_softmax(-1)
        torch.testing.assert_close(mixed(given, [0.5, 0.2, 0.3]), averaged.log_softmax(-1))

    def test_prob_is_the_weighted_average_of_probabilities(self) -> None:
        given = logits(3, 50)
        averaged = torch.tensor([0.5, 0.2, 0.3]) @ given.softmax(-1)
        torch.testing.assert_close(mixed(given, [0.5, 0.2, 0.3], over="prob").exp(), averaged)

    @pytest.mark.parametrize("over", ["logprob", "prob"])
    def test_it_is_a_distribution_over_any_axes_between(self, over: Any) -> None:
        given = logits(3, 4, 5, 50)
        found = mixed(given, over=over)
        assert found.shape == (4, 5, 50)
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(4, 5))
        torch.testing.assert_close(found[2, 3], mixed(given[:, 2, 3], over=over))

    @pytest.mark.parametrize("over", ["logprob", "prob"])
    def test_all_the_weight_on_one_member_is_that_member(self, over: Any) -> None:
        given = logits(3, 50)
        given[0, 3], given[2] = NEVER, math.nan
        assert torch.equal(mixed(given, [1.0, 0.0, 0.0], over=over), given[0].log_softmax(-1))

    def test_equal_weights_are_the_default_and_others_are_made_to_sum_to_one(self) -> None:
        given = logits(2, 9)
        assert torch.equal(mixed(given), mixed(given, [0.5, 0.5]))
        torch.testing.assert_close(mixed(given, [3.0, 1.0]), mixed(given, [0.75, 0.25]))

    def test_what_one_excludes_is_excluded_over_logprob_and_possible_over_prob(self) -> None:
        given = torch.tensor([[0.0, 0.0, NEVER], [0.0, NEVER, 0.0]])
        assert mixed(given).exp().tolist() == [1.0, 0.0, 0.0]
        torch.testing.assert_close(mixed(given, over="prob").exp(), torch.tensor([0.5, 0.25, 0.25]))

    @pytest.mark.parametrize("over", ["logprob", "prob"])
    @pytest.mark.parametrize("level", [1e4, -1e4, 3e37])
    def test_large_logits_stay_numbers(self, over: Any, level: float) -> None:
        given = torch.tensor([[level, level, 0.0], [0.0, 0.0, -level]])
        found = mixed(given, over=over)
        assert bool(found.exp().isfinite().all()) and math.isclose(float(found.exp().sum()), 1.0, rel_tol=1e-6)

    @pytest.mark.parametrize("over", ["logprob", "prob"])
    def test_its_logits_lie_where_those_of_the_members_do(self, over: Any) -> None:
        """A repetition penalty divides by where they lie."""
        one, other = logits(50), logits(50, seed=1)
        torch.testing.assert_close(mixed_logits(torch.stack([one, one]), [0.3, 0.7], over), one)
        found = mixed_logits(torch.stack([one, other]), [0.3, 0.7], over)
        torch.testing.assert_close(mixed_logits(torch.stack([one + 5, other + 5]), [0.3, 0.7], over), found + 5)
        torch.testing.assert_close(found.log_softmax(-1), mixed(torch.stack([one, other]), [0.3, 0.7], over=over))

    def test_half_precision_is_mixed_in_float32(self) -> None:
        given = logits(2, 50).bfloat16()
        assert torch.equal(mixed(given), mixed(given.float())) and mixed(given).dtype == torch.float32

    def test_a_negative_weight_turns_away_from_a_member(self) -> None:
        given = torch.tensor([[2.0, 2.0, 0.0, 1.0], [2.0, 0.0, 2.0, NEVER]])
        found = mixed(given, [1.5, -0.5])
        assert found.argmax() == 1 and found[0] > found[2] and found[3] == NEVER


class TestRefused:
    @pytest.mark.parametrize(
        ("weights", "over", "says"),
        [
            ([1.5, -0.5], "prob", "-0.5 is negative"),
            ([1.0, -1.0], "logprob", "sum to 0"),
            ([0.1, -0.3], "logprob", "sum to -0.2"),
            ([0.0, 0.0], "logprob", "every weight is 0"),
            ([1.0], "logprob", "1 weights for 2"),
            ([math.nan, 1.0], "prob", "nan is no weight"),
            (None, "median", "'median' is no method. Use one of: logprob, prob"),
        ],
    )
    def test_weights_and_ways_that_mean_nothing(self, weights: Any, over: Any, says: str) -> None:
        with pytest.raises(InputError) as caught:
            mixed(logits(2, 9), weights, over=over)
        assert says in str(caught.value)

    @pytest.mark.parametrize("shape", [(9,), (0, 9)])
    def test_logits_without_members(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match="members by vocabulary"):
            mixed(torch.zeros(shape))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("over", ["logprob", "prob"])
    def test_logits_that_are_no_numbers(self, value: float, over: Any) -> None:
        given = logits(2, 9)
        given[1, 4] = value
        with pytest.raises(MaltuError, match="no numbers"):
            mixed(given, over=over)

    def test_a_member_that_excludes_everything(self) -> None:
        given = logits(2, 9)
        given[0] = NEVER
        with pytest.raises(MaltuError, match="exclude every token"):
            mixed(given)

    def test_members_that_leave_nothing_between_them(self) -> None:
        with pytest.raises(MaltuError, match="Between them"):
            mixed(torch.tensor([[0.0, NEVER], [NEVER, 0.0]]))
        assert mixed(torch.tensor([[0.0, NEVER], [NEVER, 0.0]]), over="prob").exp().tolist() == [0.5, 0.5]


class TestDecoding:
    @pytest.mark.parametrize("over", ["logprob", "prob"])
    @pytest.mark.parametrize("penalty", [1.0, 1.8])
    def test_a_sampled_answer_of_one_member_is_its_own(self, over: Any, penalty: float, world: World) -> None:
        """With a repetition penalty too, which depends on where logits lie."""
        sampling = Sampling(temperature=1.3, top_k=40, max_tokens=9, seed=11, repetition_penalty=penalty)
        weights = {"lora": 0.0, "lora-7": 2.0, "prefix-2": 0.0}
        answers = Mix.of(list(weights), weights, over).answer(world.stack(), words(), PROMPTS, sampling)
        world.alone("lora-7", torch.tensor(PROMPTS[0]))
        plain = generate(world._alone["lora-7"], words(), PROMPTS, sampling)
        assert answers == plain

    def test_a_sampled_mixture_follows_its_own_distribution(self, world: World) -> None:
        """The share of each first token over many seeds, against the mixture of what plain models say."""
        row = torch.tensor(PROMPTS[0])
        wanted = mixed(torch.stack([world.alone(name, row)[-1] for name in TRIO]), over="prob").exp()
        sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=1)
        answers = Mix.of(TRIO, how="prob").answer(world.stack(), words(), [PROMPTS[0]] * 3000, sampling)
        found = torch.zeros(96)
        for answer in answers:
            found[answer.ids[0] if answer.ids else 2] += 1 / len(answers)
        assert off(found, wanted) < 4 * math.sqrt(0.25 / 3000)

    def test_prompts_of_many_lengths_leave_the_batch_as_they_end(self, world: World) -> None:
        stack = world.stack()
        prompts = [some_rows(1, 2 + number % 5, seed=number)[0].tolist() for number in range(12)]
        together = Mix.of(TRIO).answer(stack, words(), prompts, SAMPLED)
        assert len({len(answer.ids) for answer in together}) > 1
        alone = Mix.of(TRIO).answer(stack, words(), [prompts[0]], SAMPLED)
        assert together[0] == alone[0]

    def test_the_base_may_be_a_member_and_weights_decide(self, world: World) -> None:
        stack = world.stack()
        one, other = (
            Mix.of(["lora", None], {"lora": 1.0, "base": one}).answer(stack, words(), PROMPTS, GREEDY)
            for one in (0.0, 50.0)
        )
        plain = generate(make_base(), words(), PROMPTS, GREEDY)
        assert [answer.ids for answer in other] == [answer.ids for answer in plain] and one != other

    def test_dropout_is_off_and_no_gradient_is_kept_while_it_answers(self, world: World) -> None:
        stack = world.stack(["lora"])
        stack.add("prefix", world.folders["prefix"], learns=True)
        plain = Mix.of(["lora", "prefix"]).answer(stack, words(), PROMPTS, GREEDY)
        for module in stack.base.train().modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.9
        assert Mix.of(["lora", "prefix"]).answer(stack, words(), PROMPTS, GREEDY) == plain
        with answering(stack, ["lora", "prefix"], Mixture, weights=(0.5, 0.5), over="prob") as opened:
            assert not any(layer.keys.requires_grad for layer in opened.start(2).kept.layers)

    def test_it_streams_what_it_generates(self, world: World) -> None:
        stack = world.stack()
        with answering(stack, TRIO, Mixture, weights=(0.2, 0.3, 0.5), over="logprob") as opened:
            pieces = list(stream(opened, words(), PROMPTS[0], GREEDY))
        answer = Mix.of(TRIO, [0.2, 0.3, 0.5]).answer(stack, words(), PROMPTS[:1], GREEDY)[0]
        assert "".join(pieces) == answer.text and len(pieces) > 1

    def test_kept_positions_are_mixed_as_last_ones_are(self, world: World) -> None:
        rows = [torch.tensor(prompt) for prompt in PROMPTS]
        ids, mask = padded(rows, "right", 8)
        keep = torch.zeros_like(mask)
        for index, row in enumerate(rows):
            keep[index, len(row) - 2 : len(row)] = 1
        with answering(world.stack(), TRIO, Mixture, weights=(0.2, 0.3, 0.5), over="prob") as opened:
            found = opened.logits(ids, mask, None, keep)
            last = [opened.logits(row[None], torch.ones(1, len(row), dtype=torch.long), None)[0] for row in rows]
        assert found.shape == (6, 96) and off(found[1::2], torch.stack(last)) < 1e-5

    def test_a_prefix_takes_its_room_from_the_context(self, world: World) -> None:
        long = some_rows(1, 61)[0].tolist()
        with pytest.raises(InputError, match="the base holds 60"):
            Mix.of(["lora", "prefix"]).answer(world.stack(), words(), [long], GREEDY)
        assert len(Mix.of(["lora", "reft"]).answer(world.stack(), words(), [long], GREEDY)[0].ids) <= 3

    @pytest.mark.parametrize("base", ["gemma3", "gpt2"])
    def test_it_decodes_past_a_sliding_window_and_on_other_families(self, base: str, tmp_path: Path) -> None:
        """Against the whole row computed anew for each token."""
        world = World(tmp_path / "adapters", base)
        prompt, sampling = some_rows(1, 28)[0].tolist(), Sampling(temperature=0.0, max_tokens=8)
        answer = Mix.of(["lora", "lora-7", "reft"]).answer(world.stack(), words(), [prompt], sampling)[0]
        ids = list(prompt)
        for token in answer.ids:
            stacked = torch.stack([world.alone(name, torch.tensor(ids))[-1] for name in ("lora", "lora-7", "reft")])
            assert int(mixed(stacked).argmax()) == token
            ids.append(token)
        assert answer.ids

    def test_prefixes_are_not_pushed_out_of_a_sliding_window_by_padding(self, tmp_path: Path) -> None:
        stack = World(tmp_path / "adapters", "gemma3").stack()
        prompts, sampling = [some_rows(1, n)[0].tolist() for n in (19, 26, 26)], Sampling(temperature=0.0, max_tokens=9)
        together = Mix.of(["prefix", "lora"]).answer(stack, words(), prompts, sampling)
        for prompt, answer in zip(prompts, together, strict=True):
            assert Mix.of(["prefix", "lora"]).answer(stack, words(), [prompt], sampling)[0] == answer

    def test_weights_that_are_no_numbers_are_named(self, world: World) -> None:
        stack = world.stack(["lora"])
        broken = new_adapter(stack.base, Lora(rank=2), seed=0)
        slot = stack.add("망가짐", broken, learns=True)
        assert slot == 1
        for leaf in stack.learning("망가짐").values():
            leaf.detach().fill_(math.nan)
        with pytest.raises(MaltuError, match="no numbers"):
            Mix.of(["lora", "망가짐"]).answer(stack, words(), PROMPTS, GREEDY)
