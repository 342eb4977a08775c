"""Several adapters in one recipe: what becomes of each of them, and the talk of all of them."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import RecipeError
from toolkit.recipe.experts import expert_recipes, files_of, stands_alone, union
from toolkit.recipe.model import Base, Lora, NewBase, Prefix, Recipe, Reft
from toolkit.recipe.read import read_recipe
from toolkit.recipe.show import schema, to_yaml

HEAD = "name: 모두\nbase: {model: spoken-mini}\n"
CASUAL, POLITE, PROBES = "maltu:talk/casual.ko.jsonl", "maltu:talk/polite.ko.jsonl", "maltu:probes.jsonl"
FORM = "{kind: labels, text: messages, label: expert}"
OWN = (
    f"experts:\n  casual: {{data: {{train: ['{CASUAL}']}}}}\n"
    f"  polite: {{data: {{train: [{{path: '{POLITE}', weight: 2}}, '{CASUAL}']}}}}\n"
)


def read(tmp_path: Path, more: str, *overrides: str, to_run: bool = True) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(HEAD + more, encoding="utf-8")
    return read_recipe(file, overrides, to_run=to_run)


def shared(more: str) -> str:
    return f"data: {{train: ['{PROBES}']}}\n{more}"


def recipes(recipe: Recipe) -> dict[str, Recipe]:
    found = expert_recipes(recipe)
    return {name: one for name, one in found.items() if isinstance(one, Recipe)}


def test_an_expert_is_the_whole_recipe_with_its_own_values_laid_over_it(tmp_path: Path) -> None:
    more = shared(
        "adapter: {kind: lora, rank: 8, dropout: 0.1}\ntrain: {epochs: 2, batch_size: 4}\nexperts:\n"
        "  wide: {adapter: {rank: 32}}\n  짧게: {adapter: {kind: prefix, tokens: 4}, train: {epochs: 5}}\n"
    )
    recipe = read(tmp_path, more)
    wide, brief = recipes(recipe).values()
    assert list(expert_recipes(recipe)) == ["wide", "짧게"]
    assert wide.adapter == Lora(rank=32, dropout=0.1) and brief.adapter == Prefix(tokens=4)
    assert (wide.train.epochs, brief.train.epochs, brief.train.batch_size) == (2, 5, 4)
    assert (wide.name, wide.experts, wide.combine, wide.data) == ("모두", None, None, recipe.data)


def test_an_expert_may_be_a_run_that_exists(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    recipe = read(tmp_path, shared(f"experts: {{old: {{run: '{tmp_path}/old'}}, new: {{}}}}\ncombine: {{kind: mix}}\n"))
    assert expert_recipes(recipe)["old"] == f"{tmp_path}/old"
    assert files_of(recipe) == {"old": (), "new": (PROBES,)}


def test_a_recipe_of_runs_alone_keeps_its_talk(tmp_path: Path) -> None:
    more = shared("experts: {a: {run: runs/a}, b: {run: runs/b}}\ncombine: {kind: merge}\n")
    recipe = read(tmp_path, more, to_run=False)
    assert union(recipe) == recipe and expert_recipes(recipe) == {"a": "runs/a", "b": "runs/b"}


def test_a_recipe_of_runs_alone_has_their_talk_where_it_names_none(tmp_path: Path) -> None:
    for name, files in (("a", f"['{CASUAL}', ./gone.jsonl]"), ("b", f"[{{path: '{POLITE}', weight: 2}}, '{CASUAL}']")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        (tmp_path / name / "recipe.yaml").write_text(f"{HEAD}data: {{train: {files}}}\n", encoding="utf-8")
    experts = f"experts: {{a: {{run: '{tmp_path}/a'}}, b: {{run: '{tmp_path}/b'}}}}\ncombine: {{kind: merge}}\n"
    assert read(tmp_path, experts).data.train == (CASUAL, POLITE)
    assert read(tmp_path, f"data: {{valid: 0.2}}\n{experts}").data.valid == 0.2
    assert read(tmp_path, shared(experts)).data.train == (PROBES,)
    (tmp_path / "a" / "recipe.yaml").write_text("- no recipe", encoding="utf-8")
    (tmp_path / "b" / "recipe.yaml").unlink()
    with pytest.raises(RecipeError, match=r"data\.train: is missing"):
        read(tmp_path, experts)


def test_the_talk_of_all_experts_is_the_recipe_s_own_where_each_names_its_files(tmp_path: Path) -> None:
    recipe = read(tmp_path, f"data: {{valid: 0.2}}\n{OWN}")
    assert (recipe.data.train, recipe.data.valid) == ((CASUAL, POLITE), 0.2)
    assert read(tmp_path, OWN).data.train == (CASUAL, POLITE)


def test_the_talk_of_all_experts_is_every_file_once_in_order_without_weights(tmp_path: Path) -> None:
    more = f"data: {{train: [{{path: '{PROBES}', weight: 3}}]}}\n{OWN}  both: {{}}\n"
    recipe = read(tmp_path, more)
    assert union(recipe).data.train == (CASUAL, POLITE, PROBES)
    assert files_of(recipe) == {"casual": (CASUAL,), "polite": (POLITE, CASUAL), "both": (PROBES,)}
    assert recipes(recipe)["polite"].data.train_weights == (2, 1)


def test_the_union_has_the_same_experts(tmp_path: Path) -> None:
    recipe = read(
        tmp_path, f"data: {{train: [{{path: '{PROBES}', weight: 3}}]}}\n{OWN}  both: {{train: {{seed: 3}}}}\n"
    )
    whole = union(recipe)
    assert expert_recipes(whole)["both"] == expert_recipes(recipe)["both"]
    assert files_of(whole) == files_of(recipe) and union(whole) == whole


def test_a_recipe_without_experts_is_its_own_union(tmp_path: Path) -> None:
    recipe = read(tmp_path, f"data: {{train: [{{path: '{PROBES}', weight: 3}}]}}\ncombine: {{kind: bag}}\n")
    assert union(recipe) is recipe and expert_recipes(recipe) == {}


@pytest.mark.parametrize(
    "more",
    [
        OWN,
        OWN + "combine: {kind: route}\n",
        f"task: classify\ndata: {{train: ['{CASUAL}'], format: {{kind: labels, text: messages, label: expert}}}}\n"
        "experts: {첫째: {train: {seed: 1}}, 둘째: {adapter: {kind: ia3, options: {target_modules: [q_proj]}}}}\n"
        "combine: {kind: vote}\n",
        shared(
            "experts: {a: {run: runs/a}, b: {adapter: {targets: [q_proj, v_proj], alpha: 3x}}}\ncombine: {kind: mix}\n"
        ),
    ],
)
def test_experts_written_out_read_as_equal_experts(tmp_path: Path, more: str) -> None:
    recipe = read(tmp_path, more, to_run=False)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    again = read_recipe(tmp_path / "again.yaml", to_run=False)
    assert again == recipe and expert_recipes(again) == expert_recipes(recipe)


def test_a_member_of_a_vote_may_stand_on_a_base_of_its_own(tmp_path: Path) -> None:
    labels = f"task: classify\ndata: {{train: ['{CASUAL}'], format: {FORM}}}\n"
    more = (
        "experts:\n  one: {}\n  new: {base: {new: {hidden: 48}}, adapter: {kind: full}, train: {packing: false}}\n"
        "  elsewhere: {base: {model: owner/name}}\ncombine: {kind: vote}\n"
    )
    recipe = read(tmp_path, labels + more)
    made = recipes(recipe)
    assert isinstance(made["new"].base, NewBase) and made["new"].base.new.hidden == 48
    assert {name: stands_alone(recipe, one) for name, one in made.items()} == {
        "one": False,
        "new": True,
        "elsewhere": True,
    }


def test_a_member_of_a_vote_that_no_stack_holds_is_a_run_of_its_own(tmp_path: Path) -> None:
    kinds = {
        "dora": "{dora: true}, train: {max_length: 64, precision: fp32}", "ia3": "{kind: ia3}", "full": "{kind: full}",
        "pissa": "{init: pissa}", "wide": "{kind: prefix, projection: true}", "plain": "{rank: 4}",
    }  # fmt: skip
    own = "".join(f"  {name}: {{adapter: {told}}}\n" for name, told in kinds.items())
    labels = f"task: classify\ndata: {{train: ['{CASUAL}'], format: {FORM}}}\n"
    recipe = read(tmp_path, f"{labels}experts:\n{own}combine: {{kind: vote}}\n")
    made = recipes(recipe)
    assert [name for name, one in made.items() if stands_alone(recipe, one)] == ["dora", "ia3", "full"]
    assert made["dora"].train.max_length == 64
    assert not any(stands_alone(recipe.model_copy(update={"combine": None}), one) for one in made.values())


def test_an_expert_s_base_brings_nothing_of_the_other_with_it(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "a",
            "base": {"model": "owner/one", "revision": "abc", "trust_remote_code": True},
            "data": {"train": ["a.jsonl"]},
            "experts": {"a": {"base": {"model": "owner/two"}}, "b": {}},
            "combine": {"kind": "vote", "how": "hard"},
        }
    )
    assert recipes(recipe)["a"].base == Base(model="owner/two")
    assert recipes(recipe)["b"].base == recipe.base


def test_a_broken_expert_made_in_python_is_a_recipe_error() -> None:
    recipe = Recipe.model_validate(
        {"name": "a", "base": {"model": "b"}, "data": {"train": ["a"]}, "experts": {"x": {"adapter": {"rnak": 3}}}}
    )
    with pytest.raises(RecipeError, match=r"experts\.x\.adapter\.rnak: not a key of a lora adapter"):
        expert_recipes(recipe)


# On the command line


def test_an_override_reaches_one_expert(tmp_path: Path) -> None:
    recipe = read(tmp_path, OWN, "experts.polite.train.learning_rate=2e-3", "experts.casual.adapter.kind=reft")
    made = recipes(recipe)
    assert (made["polite"].train.learning_rate, made["casual"].train.learning_rate) == (0.002, "auto")
    assert made["casual"].adapter == Reft() and files_of(recipe)["casual"] == (CASUAL,)


def test_an_override_makes_an_expert_and_takes_all_of_them_away(tmp_path: Path) -> None:
    made = read(tmp_path, shared(""), "experts.넓게.adapter.rank=64")
    assert list(recipes(made)) == ["넓게"]
    assert read(tmp_path, shared("experts: {a: {}}\n"), "experts=").experts is None


def test_a_kind_on_the_command_line_replaces_the_expert_s_section(tmp_path: Path) -> None:
    more = shared("experts: {a: {adapter: {rank: 4, alpha: 4}}, b: {adapter: {kind: reft, rank: 2}}}\n")
    recipe = read(tmp_path, more, "experts.a.adapter.kind=prefix", "experts.b.adapter.kind=reft")
    assert [one.adapter for one in recipes(recipe).values()] == [Prefix(), Reft(rank=2)]
    same = read(
        tmp_path,
        "adapter: {kind: reft}\n" + shared("experts: {a: {adapter: {rank: 2}}}"),
        "experts.a.adapter.kind=reft",
    )
    assert recipes(same)["a"].adapter == Reft(rank=2)


def test_a_run_on_the_command_line_replaces_what_the_expert_was(tmp_path: Path) -> None:
    recipe = read(tmp_path, OWN, "experts.polite.run=runs/old", to_run=False)
    assert expert_recipes(recipe)["polite"] == "runs/old"


def test_a_name_is_the_same_in_both_forms_of_unicode(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "친절")
    assert decomposed != "친절"
    recipe = read(tmp_path, shared("experts: {친절: {train: {seed: 1}}}\n"), f"experts.{decomposed}.train.epochs=1")
    assert list(recipe.experts or {}) == ["친절"] and recipes(recipe)["친절"].train.seed == 1


def test_an_editor_takes_recipes_whose_experts_bring_their_own_talk() -> None:
    validator = pytest.importorskip("jsonschema_rs").validator_for(json.loads(schema()))
    head: dict[str, Any] = {"name": "a", "base": {"model": "b"}}
    talk: dict[str, Any] = {"data": {"train": ["a.jsonl"]}}
    rank: dict[str, Any] = {**talk, "experts": {"a": {"adapter": {"rank": 3}}}}
    taken = [{"experts": {"a": talk}}, rank, talk]
    refused: list[dict[str, Any]] = [
        {},
        {"data": {}},
        {"experts": {"a": {"tran": {}}}},
        talk | {"combine": {"kind": "mux"}},
    ]
    assert [validator.is_valid(head | more) for more in taken] == [True] * 3
    assert [validator.is_valid(head | more) for more in refused] == [False] * 4
