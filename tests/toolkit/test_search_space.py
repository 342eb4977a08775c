"""The dimensions of a recipe as Optuna's parameters, the recipe's own values among them, and the points of a grid."""

from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.search_world import GRID, KINDS, RESOLVED, make_recipe
from toolkit.errors import RecipeError
from toolkit.recipe.model import Recipe
from toolkit.search.space import grid, own_values, suggest


def suggested(recipe: Recipe, **params: Any) -> tuple[Recipe, dict[str, Any]]:
    trial = optuna.trial.FixedTrial({name.replace("__", "."): value for name, value in params.items()})
    return suggest(trial, recipe), trial.params  # type: ignore[arg-type]


def test_a_trials_recipe_has_the_proposed_values_and_no_search(tmp_path: Path) -> None:
    made, params = suggested(make_recipe(tmp_path), train__learning_rate=0.001, train__batch_size=16)
    assert made.train.learning_rate == 0.001
    assert made.train.batch_size == 16
    assert made.search is None
    assert params == {"train.learning_rate": 0.001, "train.batch_size": 16}


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    made, _ = suggested(make_recipe(tmp_path, space="{adapter.rank: {low: 4, high: 64, log: true}}"), adapter__rank=8)
    assert type(made.adapter.rank) is int  # type: ignore[union-attr]


def test_whole_bounds_of_a_key_with_a_point_are_a_range_of_all_numbers(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, space="{train.epochs: {low: 1, high: 3}}")
    made, _ = suggested(recipe, train__epochs=1.25)
    assert made.train.epochs == 1.25


def test_only_the_chosen_kinds_dimensions_are_proposed(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, space=KINDS)
    params = {"adapter.kind": "prefix", "prefix/tokens": 8, "lora/rank": 4, "train.batch_size": 4}
    trial = optuna.trial.FixedTrial(params)
    made = suggest(trial, recipe)  # type: ignore[arg-type]
    assert (made.adapter.kind, made.adapter.tokens) == ("prefix", 8)  # type: ignore[union-attr]
    assert set(trial.params) == {"adapter.kind", "prefix/tokens", "train.batch_size"}


def test_a_kind_without_dimensions_has_its_defaults(tmp_path: Path) -> None:
    trial = optuna.trial.FixedTrial({"adapter.kind": "reft", "train.batch_size": 4})
    assert suggest(trial, make_recipe(tmp_path, space=KINDS)).adapter.kind == "reft"  # type: ignore[arg-type]


def test_the_recipes_own_values_with_auto_resolved(tmp_path: Path) -> None:
    assert own_values(make_recipe(tmp_path), RESOLVED) == {"train.learning_rate": 0.003, "train.batch_size": 8}


@pytest.mark.parametrize(
    ("space", "resolved"),
    [
        ("{train.learning_rate: {low: 1.0e-5, high: 1.0e-3}}", RESOLVED),  # auto is above
        ("{train.learning_rate: {low: 1.0e-5, high: 1.0}}", {}),  # nobody says what auto is
        ("{train.batch_size: [4, 16]}", RESOLVED),
        ("{train.batch_size: {low: 2, high: 14, step: 4}}", RESOLVED),  # 2, 6, 10, 14
        ("{train.warmup_ratio: {low: 0.0, high: 0.3, step: 0.1}}", RESOLVED),  # 0.05 lies between
        ("{adapter: {prefix: {}, reft: {}}}", RESOLVED),
    ],
)
def test_own_values_outside_the_space_are_none(tmp_path: Path, space: str, resolved: dict[str, float]) -> None:
    assert own_values(make_recipe(tmp_path, space=space), resolved) is None


def test_own_values_of_a_space_with_kinds_are_those_of_the_recipes_kind(tmp_path: Path) -> None:
    space = "{adapter: {lora: {rank: {low: 4, high: 64}}, prefix: {tokens: [4]}}}"
    assert own_values(make_recipe(tmp_path, space=space), RESOLVED) == {"adapter.kind": "lora", "lora/rank": 16}


def test_own_values_on_a_step_are_free_of_rounding(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, space="{train.epochs: {low: 0.3, high: 3.3, step: 0.1}}")
    assert own_values(recipe, {}) == {"train.epochs": 3.0}


def test_a_grid_lists_both_ends_free_of_rounding(tmp_path: Path) -> None:
    assert grid(make_recipe(tmp_path, space=GRID)) == {
        "train.warmup_ratio": [0.0, 0.1, 0.2, 0.3],
        "train.batch_size": [4, 8, 16],
    }


def test_a_grid_of_whole_numbers(tmp_path: Path) -> None:
    assert grid(make_recipe(tmp_path, space="{adapter.rank: {low: 4, high: 16, step: 4}}")) == {
        "adapter.rank": [4, 8, 12, 16]
    }


def test_a_range_without_step_has_no_grid(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a step"):
        grid(make_recipe(tmp_path))


def test_values_that_do_not_go_together_are_a_recipe_error(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, space="{train.optimizer: [adamw], train.batch_size: [4, 8]}")
    trial = optuna.trial.FixedTrial({"train.optimizer": "adamw", "train.batch_size": 4})
    broken = recipe.model_copy(update={"train": recipe.train.model_copy(update={"warmup_ratio": 7.0})})
    with pytest.raises(RecipeError):
        suggest(trial, broken)  # type: ignore[arg-type]
