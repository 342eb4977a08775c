"""How several adapters are combined, as a recipe says it: defaults, what is taken, and what check prints."""

import io
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console

from toolkit.check import show_many
from toolkit.combine.methods import METHODS, names_of
from toolkit.combine.sparse import SPARSE as DROPPING
from toolkit.fit.plan import Place, Shape
from toolkit.fit.prepare import Rows
from toolkit.fit.preview import Previewed
from toolkit.recipe.combine import (
    COMBINES,
    MERGES,
    SPARSE,
    Bag,
    Boost,
    Gate,
    Merge,
    Mix,
    Route,
    Vote,
    how_of,
    set_by_hand,
)
from toolkit.recipe.model import Recipe
from toolkit.recipe.read import read_recipe
from toolkit.recipe.show import to_yaml

HEAD = "name: 조합\nbase: {model: spoken-mini}\ndata: {train: ['maltu:probes.jsonl']}\n"
EXPERTS = "experts: {친구: {train: {seed: 1}}, polite: {train: {seed: 2}}}\n"
LABELS = "task: classify\nevaluate: {prompts: null}\n"
AS_LABELS = "data.format={kind: labels, text: a, label: b}"


def read(tmp_path: Path, more: str, *overrides: str) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(HEAD + more, encoding="utf-8")
    return read_recipe(file, overrides)


def test_a_recipe_without_experts_combines_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "").combine is None


@pytest.mark.parametrize(
    ("combine", "wanted"),
    [
        ("{kind: route}", Route(router="classifier", top_k=1, default="base", margin=0.1, encoder=None)),
        ("{kind: route, default: 친구, top_k: 2}", Route(default="친구", top_k=2)),
        ("{kind: merge}", Merge(method="exact", weights="equal", rank=None, density=None, trials=24)),
        ("{kind: merge, method: svd, rank: 8}", Merge(method="svd", rank=8)),
        ("{kind: merge, method: dare_ties, density: 0.3, rank: 4}", Merge(method="dare_ties", density=0.3, rank=4)),
        ("{kind: merge, weights: search, trials: 8}", Merge(weights="search", trials=8)),
        ("{kind: merge, weights: {친구: -0.5, polite: 1}}", Merge(weights={"친구": -0.5, "polite": 1})),
        ("{kind: mix}", Mix(over="logprob", weights="equal")),
        ("{kind: mix, weights: {친구: 3, polite: -1}}", Mix(weights={"친구": 3, "polite": -1})),
        ("{kind: mix, over: prob, weights: {친구: 7, polite: 3}}", Mix(over="prob", weights={"친구": 7, "polite": 3})),
        ("{kind: mix, weights: search}", Mix(weights="search")),
        (
            "{kind: gate}",
            Gate(per="model", how="learned", top_k=None, hidden=32, epochs=2.0, learning_rate=3e-3, balance=0.01),
        ),
        ("{kind: gate, per: layer, top_k: 2}", Gate(per="layer", top_k=2)),
        ("{kind: gate, how: arrow}", Gate(how="arrow")),
        ("{kind: vote, how: hard}", Vote(how="hard", weights="equal")),
    ],
)
def test_a_combination_of_experts_has_the_defaults_of_the_design(tmp_path: Path, combine: str, wanted: object) -> None:
    assert read(tmp_path, f"{EXPERTS}combine: {combine}\n").combine == wanted


@pytest.mark.parametrize(
    ("combine", "wanted"),
    [
        ("{kind: bag}", Bag(members=10, vote="soft", bootstrap=True)),
        ("{kind: bag, members: 3, vote: hard, bootstrap: false}", Bag(members=3, vote="hard", bootstrap=False)),
        ("{kind: boost}", Boost(rounds=5, patience=1)),
    ],
)
def test_a_bag_and_a_boost_make_their_members(tmp_path: Path, combine: str, wanted: object) -> None:
    recipe = read(tmp_path, f"combine: {combine}\n")
    assert recipe.combine == wanted and recipe.experts is None


def test_a_vote_over_labels_takes_every_way(tmp_path: Path) -> None:
    for how in ("hard", "soft", "logprob"):
        combine = f"combine: {{kind: vote, how: {how}, weights: search}}\n"
        assert read(tmp_path, LABELS + EXPERTS + combine, AS_LABELS).combine == Vote(how=how, weights="search")


def test_a_vote_takes_adapters_that_no_stack_holds(tmp_path: Path) -> None:
    more = "experts: {a: {adapter: {dora: true}}, b: {adapter: {kind: ia3}}, c: {adapter: {kind: full}}}\n"
    recipe = read(tmp_path, f"{LABELS}{more}combine: {{kind: vote}}\n", AS_LABELS)
    assert isinstance(recipe.combine, Vote)


@pytest.mark.parametrize("kind", MERGES)
def test_a_merge_takes_every_method_that_its_kind_has(tmp_path: Path, kind: str) -> None:
    for method in MERGES[kind]:
        more = f"adapter: {{kind: {kind}}}\n{EXPERTS}combine: {{kind: merge, method: {method}}}\n"
        assert how_of(read(tmp_path, more).combine) == method  # type: ignore[arg-type]


def test_a_pissa_start_merges_and_routes_for_it_is_kept_as_plain_lora(tmp_path: Path) -> None:
    for kind in ("merge", "route"):
        assert read(tmp_path, f"adapter: {{init: pissa}}\n{EXPERTS}combine: {{kind: {kind}}}\n").combine is not None


@pytest.mark.parametrize(
    "combine", ["{kind: merge, weights: {친구: 1, polite: 2}}", "{kind: bag}", "{kind: gate, epochs: 1}"]
)
def test_a_combination_written_out_reads_as_an_equal_one(tmp_path: Path, combine: str) -> None:
    recipe = read(tmp_path, (EXPERTS if "bag" not in combine else "") + f"combine: {combine}\n")
    (tmp_path / "again.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    assert read_recipe(tmp_path / "again.yaml") == recipe


def test_overrides_change_a_combination_and_another_kind_replaces_it(tmp_path: Path) -> None:
    more = f"{EXPERTS}combine: {{kind: merge, method: svd, rank: 8}}\n"
    assert read(tmp_path, more, "combine.rank=4").combine == Merge(method="svd", rank=4)
    assert read(
        tmp_path, more, "combine.kind=mix", "combine.weights.친구=2", "combine.weights.polite=1"
    ).combine == Mix(weights={"친구": 2, "polite": 1})
    assert read(tmp_path, more, "combine=").combine is None


def test_names_in_weights_are_read_in_nfc(tmp_path: Path) -> None:
    name = unicodedata.normalize("NFD", "친구")
    recipe = read(tmp_path, f"{EXPERTS}combine: {{kind: mix, weights: {{{name}: 1, polite: 1}}}}\n")
    assert recipe.combine == Mix(weights={"친구": 1, "polite": 1})


def test_the_methods_of_a_recipe_are_those_that_can_be_applied() -> None:
    assert set(SPARSE) == set(DROPPING)
    words = {"merge": Merge.model_fields["method"], "mix": Mix.model_fields["over"], "vote": Vote.model_fields["how"]}
    for kind, field in words.items():
        offered = set(field.annotation.__args__)  # type: ignore[union-attr]
        assert offered == set(names_of(kind)) - {"majority"}, kind


def test_how_a_combination_works_is_one_word() -> None:
    assert {kind: how_of(section()) for kind, section in COMBINES.items()} == {  # type: ignore[arg-type]
        "route": "classifier",
        "merge": "exact",
        "mix": "logprob",
        "gate": "learned",
        "vote": "soft",
        "bag": "soft",
        "boost": "samme",
    }


def test_what_is_set_by_hand_is_what_differs_from_the_defaults() -> None:
    assert dict(set_by_hand(Merge(rank=None, weights="search", trials=24))) == {"kind": "merge", "weights": "search"}


# What check prints


def shown(recipe: Recipe) -> str:
    nothing = Rows([], [], [], {}, {}, [])
    seen = Previewed(None, Shape(1, 1, 1, 1, 512), nothing, Place("cpu", 1, 2**30))  # type: ignore[arg-type]
    written = io.StringIO()
    show_many(recipe, seen, Console(width=200, file=written))
    return written.getvalue()


def test_check_tells_what_each_expert_is_and_how_they_are_combined(tmp_path: Path) -> None:
    more = (
        "experts: {'[b]친구': {adapter: {kind: prefix, tokens: 4}}, old: {run: .}}\ncombine: {kind: mix, over: prob}\n"
    )
    (tmp_path / "run.json").write_text("{}")
    text = shown(read(tmp_path, more.replace("run: .", f"run: '{tmp_path}'")))
    row = next(line for line in text.splitlines() if "[b]친구" in line)
    assert "prefix" in row and "adapter.kind, adapter.tokens" in row and "no talk is left of its files" in row
    assert f"of {tmp_path}" in text.replace("\n", "") and "is there" in text
    assert next(one.says for one in METHODS if one.name == "prob")[:60] in text


def test_check_tells_how_the_members_of_a_bag_answer(tmp_path: Path) -> None:
    of_text = shown(read(tmp_path, "combine: {kind: bag, members: 3}\n"))
    of_labels = shown(read(tmp_path, LABELS + "combine: {kind: bag, members: 3}\n", AS_LABELS))
    of_seeds = shown(read(tmp_path, "combine: {kind: bag, bootstrap: false, vote: hard}\n"))
    assert "3 members, each as the run above" in of_text and "experts" not in of_text
    assert "each on conversations drawn with replacement" in of_text and "K times one adapter's steps" in of_text
    assert "differ by their seeds alone" in of_seeds and "the answer that most give wins" in of_seeds
    assert "At every token the members' probabilities are averaged" in of_text
    assert "The members' probabilities of each label are averaged" in of_labels


def test_check_tells_of_a_boost_what_it_does_for_its_task(tmp_path: Path) -> None:
    of_text = shown(read(tmp_path, "combine: {kind: boost}\n"))
    of_labels = shown(read(tmp_path, LABELS + "combine: {kind: boost}\n", AS_LABELS))
    assert "a mixture over tokens grows" in of_text and "For labels" not in of_text
    assert "For labels: each round learns" in of_labels and "mixture over tokens" not in of_labels
