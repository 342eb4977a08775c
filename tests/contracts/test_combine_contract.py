"""The conformance test of combinations: what toolkit/combine/contract.py promises, for every one of them.

A new combination is done when a way to make it stands in COMBINATIONS and this passes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.combined_world import GREEDY, PROMPTS, words
from tests.stacked_world import World, make_base, off, some_rows, worn
from toolkit.combine.contract import Combination
from toolkit.combine.mix import Mix
from toolkit.combine.vote import VoteOfAnswers
from toolkit.errors import AdapterError, InputError
from toolkit.generate import Sampling, generate

Make = Callable[..., Combination]
COMBINATIONS: dict[str, Make] = {
    "mix-logprob": lambda members, weights=None: Mix.of(members, weights, "logprob"),
    "mix-prob": lambda members, weights=None: Mix.of(members, weights, "prob"),
    "vote-majority": lambda members, weights=None: VoteOfAnswers.of(members, weights),
}
TRIO = ("lora", "prefix", "reft")
SAMPLED = Sampling(temperature=1.0, top_p=1.0, max_tokens=6, seed=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama") / "adapters")


def alone(world: World, name: str | None) -> list[tuple[int, ...]]:
    """What plain PEFT's model of one adapter answers."""
    model: Any = make_base() if name is None else worn(world.folders[name], make_base())
    return [answer.ids for answer in generate(model, words(), PROMPTS, GREEDY)]


@pytest.mark.parametrize("make", COMBINATIONS.values(), ids=list(COMBINATIONS))
class TestEveryCombination:
    @pytest.mark.parametrize("name", [*TRIO, "embedding", "lora-7", None])
    def test_one_member_answers_what_its_adapter_alone_does(self, make: Make, name: str | None, world: World) -> None:
        answers = make([name]).answer(world.stack(), words(), PROMPTS, GREEDY)
        assert [answer.ids for answer in answers] == alone(world, name)

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_so_does_one_that_has_all_the_weight(self, make: Make, place: int, world: World) -> None:
        weights = [float(number == place) for number in range(3)]
        answers = make(TRIO, weights).answer(world.stack(), words(), PROMPTS, GREEDY)
        assert [answer.ids for answer in answers] == alone(world, TRIO[place])

    def test_each_prompt_is_answered_in_order_whatever_stands_beside_it(self, make: Make, world: World) -> None:
        stack, combination = world.stack(), make(TRIO)
        together = combination.answer(stack, words(), PROMPTS, GREEDY)
        assert [answer.n_prompt for answer in together] == [len(prompt) for prompt in PROMPTS]
        for prompt, answer in zip(PROMPTS, together, strict=True):
            assert combination.answer(stack, words(), [prompt], GREEDY)[0].ids == answer.ids

    def test_the_same_call_gives_the_same_answers(self, make: Make, world: World) -> None:
        first, again = (make(TRIO).answer(world.stack(), words(), PROMPTS, SAMPLED) for _ in range(2))
        assert first == again

    def test_stack_and_base_are_left_as_they_were(self, make: Make, world: World) -> None:
        stack, rows = world.stack(), some_rows(2)
        stack.base.train()
        hashes = {name: stack.hash(name) for name in stack.slots}
        make(TRIO).answer(stack, words(), PROMPTS, GREEDY)
        assert stack.base.training
        stack.base.eval()
        assert {name: stack.hash(name) for name in stack.slots} == hashes
        assert not any(parameter.requires_grad for parameter in stack.base.parameters())
        with torch.no_grad():
            assert off(stack(rows, [-1, -1]).logits, make_base()(input_ids=rows).logits) == 0

    def test_members_that_learn_can_answer_and_learn_on(self, make: Make, tmp_path: Path, world: World) -> None:
        stack = world.stack(["reft"])
        stack.add("prefix", world.folders["prefix"], learns=True)
        answers = make(["prefix", "reft"], [1.0, 0.0]).answer(stack, words(), PROMPTS, GREEDY)
        assert [answer.ids for answer in answers] == alone(world, "prefix")
        assert all(leaf.grad is None or not leaf.grad.any() for leaf in stack.learning("prefix").values())

    def test_weights_by_name_are_those_in_order(self, make: Make) -> None:
        named = make(["가", None], {"base": 0.25, "가": 0.75})
        assert named.weights == make(["가", None], [0.75, 0.25]).weights
        assert named.weights.values == (0.75, 0.25) and named.weights.told == ""

    def test_weights_that_do_not_sum_to_one_are_made_to_and_it_is_said(self, make: Make) -> None:
        made = make(["가", "나"], [3, 1])
        assert made.weights.values == (0.75, 0.25)
        assert "sum to 4" in made.weights.told and "가 0.75" in made.weights.told

    @pytest.mark.parametrize(
        ("weights", "says"),
        [
            ([1.0], "1 weights for 2 members"),
            ([0.0, 0.0], "every weight is 0"),
            ([float("nan"), 1.0], "nan is no weight"),
            ([float("inf"), 1.0], "inf is no weight"),
            (["1", 1.0], "'1' is no weight"),
            ([True, 1.0], "True is no weight"),
            ([1.0, -1.0], "(they sum to 0|-1 is negative)"),
            ([1.0, -2.0], "(they sum to -1|-2 is negative)"),
            ({"가": 1.0}, "나: has no weight"),
            ({"가": 1.0, "나": 1.0, "다": 1.0}, "다: is no member"),
        ],
    )
    def test_weights_that_mean_nothing_are_refused(self, make: Make, weights: Any, says: str) -> None:
        with pytest.raises(InputError, match=says) as caught:
            make(["가", "나"], weights)
        assert caught.value.exit_code == 2

    @pytest.mark.parametrize(("members", "says"), [([], "there is none"), (["가", "가"], "가: stands twice")])
    def test_no_member_or_the_same_twice_is_refused(self, make: Make, members: list[str], says: str) -> None:
        with pytest.raises(InputError, match=says):
            make(members)

    def test_a_member_that_the_stack_lacks_is_named_even_where_it_has_no_weight(self, make: Make, world: World) -> None:
        with pytest.raises(AdapterError, match="없는것"):
            make(["lora", "없는것"], [1.0, 0.0]).answer(world.stack(), words(), PROMPTS, GREEDY)

    @pytest.mark.parametrize(("prompt", "says"), [([], "has no tokens"), (list(range(5, 70)), "Shorten it")])
    def test_a_prompt_that_is_empty_or_too_long_is_refused(
        self, make: Make, prompt: list[int], says: str, world: World
    ) -> None:
        with pytest.raises(InputError, match=says):
            make(TRIO).answer(world.stack(), words(), [PROMPTS[0], prompt], GREEDY)

    def test_no_prompts_have_no_answers(self, make: Make, world: World) -> None:
        assert make(TRIO).answer(world.stack(), words(), [], GREEDY) == []

    def test_it_is_described(self, make: Make) -> None:
        made = make(["가"])
        assert (made.method.kind, made.method.name) == (made.kind, made.how)
