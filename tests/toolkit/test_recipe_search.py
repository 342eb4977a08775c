"""What a right search becomes: its dimensions, the recipe of a trial, overrides, and the same recipe read again."""

from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import RecipeError
from toolkit.recipe.model import Lora, PeftKind, Prefix, Range, Recipe, Search, WeightedFile
from toolkit.recipe.read import read_recipe
from toolkit.recipe.search import Dimension, dimensions, value_of, with_values
from toolkit.recipe.show import to_yaml
from toolkit.recipe.space import without_password

HEAD = "name: 말투찾기\nbase: {model: spoken-mini}\n"
DATA = "data: {train: ['maltu:talk/casual.ko.jsonl', {path: 'maltu:talk/casual.en.jsonl', weight: 0.5}]}\n"
CONDITIONAL = """
adapter: {kind: lora, rank: 8, dropout: 0.1}
search:
  space:
    train.batch_size: [4, 8]
    adapter:
      lora: {rank: [4, 8], train.learning_rate: {low: 1e-3, high: 1e-2, log: true}}
      prefix: {tokens: {low: 4, high: 16, step: 4}, projection: [true, false]}
      embedding: {}
      ia3: {options.feedforward_modules: [down_proj]}
"""


def read(tmp_path: Path, more: str, *overrides: str) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(HEAD + DATA + more, encoding="utf-8")
    return read_recipe(file, overrides)


def space(values: str) -> str:
    return f"search: {{space: {{{values}}}}}\n"


def test_a_recipe_without_a_search_has_none(tmp_path: Path) -> None:
    recipe = read(tmp_path, "")
    assert recipe.search is None and dimensions(recipe) == ()


def test_the_smallest_search_has_the_defaults_of_the_design(tmp_path: Path) -> None:
    search = read(tmp_path, space("train.batch_size: [4]")).search
    assert search == Search(
        sampler="tpe",
        pruner="successive_halving",
        trials=16,
        minutes=None,
        patience=None,
        space={"train.batch_size": (4,)},
        storage=None,
        workers="auto",
        side_by_side="auto",
    )


def test_dimensions_are_the_keys_in_the_order_they_are_written(tmp_path: Path) -> None:
    more = space("train.learning_rate: {low: 1e-4, high: 1e-2, log: true}, adapter.rank: [8, 4], train.seed: [0, 1]")
    assert dimensions(read(tmp_path, more)) == (
        Dimension("train.learning_rate", "train.learning_rate", Range(low=1e-4, high=1e-2, log=True)),
        Dimension("adapter.rank", "adapter.rank", (8, 4)),
        Dimension("train.seed", "train.seed", (0, 1)),
    )


def test_kinds_have_dimensions_of_their_own(tmp_path: Path) -> None:
    assert dimensions(read(tmp_path, CONDITIONAL)) == (
        Dimension("train.batch_size", "train.batch_size", (4, 8)),
        Dimension("adapter.kind", "adapter.kind", ("lora", "prefix", "embedding", "ia3")),
        Dimension("lora/rank", "adapter.rank", (4, 8), "lora"),
        Dimension("lora/train.learning_rate", "train.learning_rate", Range(low=1e-3, high=1e-2, log=True), "lora"),
        Dimension("prefix/tokens", "adapter.tokens", Range(low=4, high=16, step=4), "prefix"),
        Dimension("prefix/projection", "adapter.projection", (True, False), "prefix"),
        Dimension("ia3/options.feedforward_modules", "adapter.options.feedforward_modules", ("down_proj",), "ia3"),
    )


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("train.epochs", float),
        ("train.learning_rate", float),
        ("data.train.0.weight", float),
        ("adapter.alpha", float),
        ("train.batch_size", int),
        ("train.max_steps", int),
        ("adapter.rank", int),
        ("train.max_length", int),
    ],
)
def test_a_range_holds_whole_numbers_exactly_where_its_key_does(tmp_path: Path, key: str, kind: type) -> None:
    (one,) = dimensions(read(tmp_path, space(f"{key}: {{low: 2, high: 6, step: 2}}")))
    assert isinstance(one.values, Range)
    assert [type(number) for number in (one.values.low, one.values.high, one.values.step)] == [kind] * 3


def test_auto_and_null_and_words_are_choices(tmp_path: Path) -> None:
    more = space("train.learning_rate: [auto, 1e-3], train.max_grad_norm: [null, 1], train.schedule: [cosine, linear]")
    assert [one.values for one in dimensions(read(tmp_path, more))] == [
        ("auto", 0.001),
        (None, 1),
        ("cosine", "linear"),
    ]


@pytest.mark.parametrize(
    "more",
    [
        "",
        CONDITIONAL,
        space("train.learning_rate: {low: 1e-5, high: 0.1, log: true}"),
        space("train.batch_size: {low: 4, high: 16, step: 4}, train.max_grad_norm: [null, 1, 0.5]"),
        space("adapter: {lora: , prefix: {}}, data.train.1.weight: {low: 0.5, high: 2}"),
        "search: {sampler: gp, pruner: none, trials: 3, minutes: 2.5, patience: 4, workers: 2, side_by_side: 8,"
        " storage: 'postgresql+psycopg://나:비밀@[::1]:5433/db?sslmode=disable', space: {train.epochs: [1, 2]}}",
    ],
)
def test_a_search_written_out_reads_as_an_equal_recipe(tmp_path: Path, more: str) -> None:
    recipe = read(tmp_path, more)
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    again = read_recipe(file)
    assert again == recipe and to_yaml(again) == to_yaml(recipe) and dimensions(again) == dimensions(recipe)


def test_a_trial_has_its_values_and_no_search(tmp_path: Path) -> None:
    recipe = read(tmp_path, CONDITIONAL)
    trial = with_values(recipe, {"train.learning_rate": 0.002, "adapter.rank": 4, "data.train.0.weight": 2.5})
    assert trial.search is None and trial.train.learning_rate == 0.002
    assert trial.adapter == Lora(rank=4, dropout=0.1)
    assert trial.data.train == (
        WeightedFile(path="maltu:talk/casual.ko.jsonl", weight=2.5),
        WeightedFile(path="maltu:talk/casual.en.jsonl", weight=0.5),
    )


def test_a_trial_without_values_is_the_recipe_without_its_search(tmp_path: Path) -> None:
    recipe = read(tmp_path, CONDITIONAL)
    assert with_values(recipe, {}) == recipe.model_copy(update={"search": None})


@pytest.mark.parametrize(
    ("values", "adapter"),
    [
        ({"adapter.kind": "lora"}, Lora(rank=8, dropout=0.1)),
        ({"adapter.rank": 2, "adapter.kind": "lora"}, Lora(rank=2, dropout=0.1)),
        ({"adapter.kind": "prefix"}, Prefix()),
        ({"adapter.tokens": 4, "adapter.kind": "prefix"}, Prefix(tokens=4)),
        ({"adapter.kind": "ia3", "adapter.options.x.y": 1}, PeftKind(kind="ia3", options={"x.y": 1})),
    ],
)
def test_the_recipes_own_kind_keeps_its_section_and_another_has_its_defaults(
    tmp_path: Path, values: dict[str, Any], adapter: object
) -> None:
    assert with_values(read(tmp_path, CONDITIONAL), values).adapter == adapter


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"train.batch_size": 0}, "train.batch_size: must be at least 1, not 0"),
        ({"adapter.kind": "prefix", "adapter.rank": 4}, "adapter.rank: is a key of a lora adapter"),
        ({"train.optimizer": "muon"}, "train.optimizer: muon is for whole weight matrices"),
        ({"train.nothing": 1}, "train.nothing: not a key of train"),
        ({"nothing.at.all": 1}, "nothing: not a key of a recipe"),
        ({"data.train.7.weight": 1.0}, "data.train: must be a list"),
    ],
)
def test_values_that_the_recipe_cannot_have_are_refused(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    recipe = read(tmp_path, CONDITIONAL)
    with pytest.raises(RecipeError) as caught:
        with_values(recipe, values)
    assert says in str(caught.value)


def test_all_that_is_wrong_with_values_comes_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        with_values(read(tmp_path, CONDITIONAL), {"train.batch_size": 0, "adapter.rank": 0, "train.epochs": -1.0})
    assert [one.where for one in caught.value.problems] == ["adapter.rank", "train.epochs", "train.batch_size"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.batch_size", 8),
        ("train.learning_rate", "auto"),
        ("adapter.rank", 8),
        ("adapter.tokens", None),
        ("adapter.kind", "lora"),
        ("data.train.0.weight", 1.0),
        ("data.train.1.weight", 0.5),
        ("data.train.2.weight", None),
    ],
)
def test_the_recipes_own_value_is_found_by_its_key(tmp_path: Path, key: str, value: object) -> None:
    assert value_of(read(tmp_path, CONDITIONAL), key) == value


def test_an_override_changes_one_key_of_the_search(tmp_path: Path) -> None:
    recipe = read(tmp_path, CONDITIONAL, "search.trials=4", "search.pruner=none")
    assert recipe.search is not None and (recipe.search.trials, recipe.search.pruner) == (4, "none")
    assert dimensions(recipe) == dimensions(read(tmp_path, CONDITIONAL))


def test_an_override_can_take_the_search_away(tmp_path: Path) -> None:
    assert read(tmp_path, CONDITIONAL, "search=null").search is None


@pytest.mark.parametrize("before", ["", CONDITIONAL])
def test_an_overridden_space_is_the_whole_space(tmp_path: Path, before: str) -> None:
    recipe = read(tmp_path, before, "search.space={train.learning_rate: [0.001, 0.002]}")
    assert dimensions(recipe) == (Dimension("train.learning_rate", "train.learning_rate", (0.001, 0.002)),)


@pytest.mark.parametrize(
    ("override", "name", "values"),
    [
        ("search.space.train.batch_size=[2]", "train.batch_size", (2,)),
        ("search.space.train.batch_size={low: 1, high: 3}", "train.batch_size", Range(low=1, high=3)),
        ("search.space.train.weight_decay=[0, 0.1]", "train.weight_decay", (0, 0.1)),
        ("search.space.adapter.lora.rank=[1, 2]", "lora/rank", (1, 2)),
        (
            "search.space.adapter.lora.train.learning_rate.low=2e-3",
            "lora/train.learning_rate",
            Range(low=2e-3, high=1e-2, log=True),
        ),
        (
            "search.space.adapter.lora.train.learning_rate={low: 1e-3, high: 1}",
            "lora/train.learning_rate",
            Range(low=1e-3, high=1.0),
        ),
        ("search.space.adapter.prefix={tokens: [3]}", "prefix/tokens", (3,)),
        ("search.space.adapter.reft.rank=[2]", "reft/rank", (2,)),
        ("search.space.data.train.0.weight=[1, 2]", "data.train.0.weight", (1, 2)),
    ],
)
def test_an_override_changes_one_dimension(tmp_path: Path, override: str, name: str, values: object) -> None:
    found = {one.name: one.values for one in dimensions(read(tmp_path, CONDITIONAL, override))}
    assert found[name] == values
    others = {one.name: one.values for one in dimensions(read(tmp_path, CONDITIONAL))}
    kept = {key: value for key, value in others.items() if key not in (name, "adapter.kind", "prefix/projection")}
    assert kept.items() <= found.items()


def test_an_override_begins_a_search_where_there_was_none(tmp_path: Path) -> None:
    recipe = read(tmp_path, "", "search.trials=4", "search.space.train.batch_size=[4, 8]")
    assert recipe.search == Search(trials=4, space={"train.batch_size": (4, 8)})


def test_weights_are_told_beside_the_files(tmp_path: Path) -> None:
    data = read(tmp_path, "").data
    assert data.train_files == ("maltu:talk/casual.ko.jsonl", "maltu:talk/casual.en.jsonl")
    assert data.train_weights == (1, 0.5)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host:5432/db?a=b", "postgresql://me:***@host:5432/db?a=b"),
        ("postgresql+psycopg://me:se:c@ret@[::1]/db", "postgresql+psycopg://me:***@[::1]/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("sqlite:////tmp/찾기.db", "sqlite:////tmp/찾기.db"),
        ("postgresql://me:secret@[host/db", "postgresql://***"),
    ],
)
def test_a_storage_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown
