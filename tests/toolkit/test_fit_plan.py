"""What `auto` becomes, and how a step is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import RecipeError
from toolkit.fit.plan import (
    Place,
    Shape,
    count_steps,
    evaluation_steps,
    is_judged,
    largest_divisor,
    make_plan,
)
from toolkit.fit.rows import Collate, first_fit, packed
from toolkit.recipe.model import Recipe

MINI = Shape(4_200_000, 192, 6, 8192, 512)
LARGE = Shape(8_000_000_000, 4096, 32, 128_000, 131_072)
ROOMY = Place("cpu", 1, 16 << 30)


def recipe(**sections: object) -> Recipe:
    return Recipe.model_validate({"name": "r", "base": {"model": "spoken-mini"}, "data": {"train": ["x"]}, **sections})


def test_auto_length_is_the_trained_context_but_at_most_2048() -> None:
    assert make_plan(recipe(), MINI, ROOMY, 100).max_length == 512
    assert make_plan(recipe(), LARGE, Place("cuda:0", 1, 80 << 30, True), 100).max_length == 2048


def test_a_larger_base_learns_more_slowly_and_in_bf16_where_there_is_bf16() -> None:
    small, large = (
        make_plan(recipe(), MINI, ROOMY, 100),
        make_plan(recipe(), LARGE, Place("cuda:0", 1, 80 << 30, True), 100),
    )
    assert small.learning_rate > large.learning_rate
    assert (small.precision, large.precision) == ("fp32", "bf16")
    assert large.activation_checkpointing and not small.activation_checkpointing


def test_a_small_memory_makes_small_micro_batches_and_keeps_the_step() -> None:
    plan = make_plan(recipe(), MINI, Place("cpu", 1, 200 << 20), 500)
    assert plan.micro_batch < 8 and plan.micro_batch * plan.accumulation == 8


def test_a_batch_that_processes_cannot_share_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"train\.batch_size"):
        make_plan(recipe(), MINI, Place("cpu", 3, 8 << 30), 100)


def test_a_micro_batch_that_does_not_divide_is_an_error_that_names_one() -> None:
    with pytest.raises(RecipeError, match="Take 2"):
        make_plan(recipe(train={"micro_batch": 3}), MINI, ROOMY, 100)


@pytest.mark.parametrize("kind", ["prefix", "prompt_tuning", "p_tuning"])
def test_learned_positions_are_never_packed(kind: str) -> None:
    assert not make_plan(recipe(adapter={"kind": kind}), MINI, ROOMY, 100).packing


def test_other_kinds_are_packed() -> None:
    assert make_plan(recipe(), MINI, ROOMY, 100).packing


def test_steps_of_partial_epochs() -> None:
    assert count_steps(100, recipe(train={"epochs": 1.5, "batch_size": 8})) == (13, 20)
    assert count_steps(100, recipe(train={"max_steps": 7})) == (13, 7)


def test_the_last_step_is_always_looked_at() -> None:
    assert evaluation_steps(10, 25, 0.5) == (5, 10, 15, 20, 25)
    assert evaluation_steps(3, 4, 0.25)[-1] == 4


def test_a_loss_counts_when_the_learning_rate_has_risen() -> None:
    train = recipe(train={"warmup_ratio": 0.1}).train
    assert [is_judged(train, 40, step) for step in (1, 4, 5, 40)] == [False, False, True, True]
    assert is_judged(train, 19, 1)  # too short for a warm-up


@given(st.integers(1, 500), st.integers(0, 600))
def test_the_largest_divisor_divides_and_is_not_larger_than_allowed(number: int, at_most: int) -> None:
    found = largest_divisor(number, at_most)
    assert number % found == 0 and (found <= at_most or found == 1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_first_fit_places_every_row_once_and_overfills_none(lengths: list[int]) -> None:
    bins = first_fit(lengths, max(lengths))
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= max(lengths) for members in bins)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=100), st.none() | st.integers(1, 80))
def test_packing_places_every_row_once_and_pads_less_than_the_longest_row_would(
    lengths: list[int], at_most: int | None
) -> None:
    bins, width = packed(lengths, at_most)
    longest = max(lengths)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert longest <= width <= max(longest, min(2 * longest, at_most or 2 * longest))
    assert all(sum(lengths[i] for i in members) <= width for members in bins)
    assert len(bins) * width <= len(first_fit(lengths, longest)) * longest


def test_packing_finds_the_width_that_two_dialogues_fill() -> None:
    assert packed([100, 60, 60, 60, 20]) == ([[0, 1], [2, 3, 4]], 160)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.booleans())
def test_a_micro_batch_holds_every_supervised_token_once(lengths: list[int], packing: bool) -> None:
    rows = [{"input_ids": [7] * n, "labels": [-100, *range(1, n)]} for n in lengths]
    batch = Collate(0, packing)(rows)
    kept = batch["labels"][batch["labels"] != -100]
    assert sorted(kept.tolist()) == sorted(label for row in rows for label in row["labels"][1:])
    assert int(batch["n_tokens"]) == sum(lengths) == int((batch["input_ids"] == 7).sum())


def test_packed_rows_count_positions_from_zero_for_each_talk() -> None:
    rows = [{"input_ids": [7] * n, "labels": [-100] + [1] * (n - 1)} for n in (4, 2, 2)]
    assert Collate(0, True)(rows)["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
