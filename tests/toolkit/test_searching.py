"""The command with a `search`: what it leaves in the run folder, what it tries, and what it never does twice."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.searching_world import KEYS, RATES, contents, trials_of, write_base, write_search, write_talk
from toolkit import disk
from toolkit.evaluate.talk import held_out_loss
from toolkit.fit import cached
from toolkit.fit.member import Member
from toolkit.judge import Judge
from toolkit.loaded import load_run
from toolkit.quiet import quiet
from toolkit.recipe.read import read_recipe
from toolkit.search.crew import Crew
from toolkit.steps import prepare
from toolkit.track import read_metrics
from toolkit.train import main

EPOCHS = "train: {epochs: 1, batch_size: 8, learning_rate: 0.01, evaluate_every: 0.5, early_stop_patience: null}"
LONG = "train: {max_steps: 16, batch_size: 4, learning_rate: 0.02, evaluate_every: 0.2, early_stop_patience: null}"
Search = Callable[..., Path]


def facts_of(run: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return facts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with talk, a tiny base, and one search that is done."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        write_talk(folder / "talk.jsonl")
        write_base(folder / "base")
        write_search(folder)
        assert main(["search.yaml"]) == 0
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def run(here: Path) -> Path:
    """The run of the search that is done."""
    return here / "runs" / "말투"


@pytest.fixture
def search(here: Path) -> Iterator[Search]:
    """Search for something else in the same world, anew; returns the run."""

    def call(space: str = RATES, *overrides: str, train: str = KEYS, adapter: str = "", **search: Any) -> Path:
        shutil.rmtree(here / "runs", ignore_errors=True)
        write_search(here, space, train, adapter, **search)
        assert main(["search.yaml", *overrides]) == 0
        return here / "runs" / "말투"

    yield call


# What a search leaves


def test_run_json_says_what_was_found(run: Path) -> None:
    facts = facts_of(run)
    best = min(trials_of(run), key=lambda trial: trial.value or 9.9)
    assert facts["status"] == "finished" and facts["inputs"]["recipe"]["search.trials"] == 3
    assert facts["search"]["trials"]["complete"] == 3 and facts["search"]["steps"]["taken"] == 18
    assert (facts["search"]["best"]["number"], facts["search"]["best"]["loss"]) == (best.number, best.value)
    assert facts["fit"]["best_loss"] == best.value and facts["fit"]["stopped"] == "done"
    assert facts["results"]["after"]["loss"]["all"] < facts["results"]["before"]["loss"]["all"]
    assert facts["data"]["parts"] == {"train": 38, "valid": 5, "test": 5}
    assert not (run / "checkpoints").exists()


def test_the_result_opens_in_plain_peft_and_has_the_loss_that_the_study_says(run: Path, here: Path) -> None:
    with quiet():
        base = AutoModelForCausalLM.from_pretrained("base")
        model = PeftModel.from_pretrained(base, str(run / "adapters" / "main")).eval()
        tokenizer = AutoTokenizer.from_pretrained("base")
        rows = prepare(read_recipe(here / "search.yaml")).rows
    facts = facts_of(run)
    assert held_out_loss(model, tokenizer, rows.valid).loss == pytest.approx(facts["search"]["best"]["loss"], rel=1e-5)
    after = facts["results"]["after"]["loss"]["all"]
    assert held_out_loss(model, tokenizer, rows.test).loss == pytest.approx(after, rel=1e-5)


def test_every_trial_is_in_the_table_and_the_first_has_the_recipes_own_values(run: Path) -> None:
    with (run / "search" / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["0", "1", "2"]
    assert float(rows[0]["train.learning_rate"]) == 0.01
    assert len({row["train.learning_rate"] for row in rows}) == 3
    assert all(row["state"] == "complete" and row["steps"] == row["steps_planned"] == "6" for row in rows)


def test_a_rate_that_is_auto_is_tried_first_at_what_it_means(search: Search) -> None:
    run = search(train="train: {max_steps: 2, batch_size: 8}", trials=1)
    assert trials_of(run)[0].params == {"train.learning_rate": facts_of(run)["plan"]["learning_rate"]} != {}


def test_the_card_tells_the_search_before_the_data(run: Path) -> None:
    card = (run / "README.md").read_text(encoding="utf-8")
    best = facts_of(run)["search"]["best"]
    assert card.count("\n## Search\n") == 1 and card.index("\n## Search\n") < card.index("\n## Data\n")
    assert f"The best, trial {best['number']}, came to a held-out loss of {best['loss']:.4f}" in card
    assert "3 trials in" in card and "search/best.yaml" in card


def test_the_plots_need_no_network(run: Path) -> None:
    page = (run / "search" / "plots.html").read_text(encoding="utf-8")
    assert "말투" in page and "Plotly" in page and 'src="http' not in page


def test_the_numbers_of_each_trial_are_tracked_and_then_the_result(run: Path) -> None:
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["search/loss"] for line in lines[:3]] == [trial.value for trial in trials_of(run)]
    assert lines[3]["test/loss"] == facts_of(run)["results"]["after"]["loss"]["all"]


@pytest.mark.slow
def test_the_best_recipe_trains_and_comes_to_the_same_loss(run: Path, here: Path) -> None:
    best = run / "search" / "best.yaml"
    recipe = read_recipe(best)
    assert recipe.search is None and recipe.name == "말투_best"
    assert main([str(best), "--quiet"]) == 0
    trained, found = facts_of(here / "runs" / "말투_best"), facts_of(run)
    assert trained["fit"]["best_loss"] == pytest.approx(found["search"]["best"]["loss"], rel=1e-4)
    assert trained["results"]["after"]["loss"]["all"] == pytest.approx(
        found["results"]["after"]["loss"]["all"], rel=1e-4
    )


# The same command again


def test_the_same_command_on_a_finished_search_shows_it_and_changes_nothing(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert main(["search.yaml"]) == 0
    assert "finished already" in capfd.readouterr().out
    assert main(["search.yaml", "search.workers=2", "search.side_by_side=1", "--quiet"]) == 0
    assert contents(run) == before


@pytest.mark.slow
def test_more_trials_take_a_finished_search_up_again(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = trials_of(run)
    assert main(["search.yaml", "search.trials=5"]) == 0
    after = trials_of(run)
    assert [(t.number, t.params, t.value) for t in after[:3]] == [(t.number, t.params, t.value) for t in before]
    assert len(after) == 5 and len({t.params["train.learning_rate"] for t in after}) == 5
    said = capfd.readouterr().out
    assert "3 of 5 trials ended before" in said and "trial 3:" in said and "trial 4:" in said
    facts = facts_of(run)
    assert facts["status"] == "finished" and facts["search"]["trials"]["complete"] == 5
    assert facts["search"]["best"]["loss"] == min(t.value or 9.9 for t in after)
    assert facts["command"].endswith("search.trials=5")
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3, 4, 5]
    before_again = contents(run)
    assert main(["search.yaml", "search.trials=5", "--quiet"]) == 0
    assert contents(run) == before_again


@pytest.mark.slow
def test_fresh_sets_the_old_search_aside(run: Path) -> None:
    before = contents(run)
    assert main(["search.yaml", "--fresh", "--quiet", "search.trials=1"]) == 0
    (old,) = (run.parent / ".old").iterdir()
    assert contents(old) == before
    assert len(trials_of(run)) == 1


# What is tried


@pytest.mark.slow
def test_kinds_are_searched_each_with_its_own_values(search: Search, capfd: pytest.CaptureFixture[str]) -> None:
    space = (
        "{adapter: {lora: {rank: [2, 4], train.learning_rate: {low: 0.005, high: 0.02}},"
        " prefix: {tokens: {low: 2, high: 5}, train.learning_rate: {low: 0.1, high: 0.3}},"
        " reft: {rank: [2], train.learning_rate: {low: 0.01, high: 0.05}},"
        " embedding: {train.learning_rate: {low: 0.001, high: 0.01}}}}"
    )
    run = search(space, sampler="random", trials=12, side_by_side=5)
    trials = trials_of(run)
    kinds = {"lora", "prefix", "reft", "embedding"}
    assert {t.params["adapter.kind"] for t in trials} == kinds
    assert trials[0].params == {"adapter.kind": "lora", "lora/rank": 4, "lora/train.learning_rate": 0.01}
    prefixes = [t.params for t in trials if t.params["adapter.kind"] == "prefix"]
    assert all(set(one) == {"adapter.kind", "prefix/tokens", "prefix/train.learning_rate"} for one in prefixes)
    assert all(0.1 <= one["prefix/train.learning_rate"] <= 0.3 for one in prefixes)
    assert all(t.state.name == "COMPLETE" for t in trials)
    assert {kind["kind"] for kind in facts_of(run)["search"]["kinds"]} == kinds
    assert "no stack holds" not in capfd.readouterr().out
    assert (
        facts_of(run)["search"]["best"]["values"]["adapter.kind"]
        == load_run(run).facts["search"]["best"]["values"]["adapter.kind"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefix", "reft", "embedding"])
def test_a_best_trial_of_another_kind_than_the_recipes_is_the_result(search: Search, here: Path, kind: str) -> None:
    run = search(f"{{adapter: {{{kind}: {{train.learning_rate: {{low: 0.01, high: 0.02}}}}}}}}", trials=1)
    loaded = load_run(run)
    rows = prepare(read_recipe(here / "search.yaml")).rows
    measured = held_out_loss(loaded.model, loaded.base.tokenizer, rows.valid).loss
    assert measured == pytest.approx(facts_of(run)["search"]["best"]["loss"], rel=1e-5)
    assert facts_of(run)["search"]["best"]["values"]["adapter.kind"] == kind


@pytest.mark.slow
def test_kinds_that_no_stack_holds_are_trained_one_by_one(
    search: Search, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    space = (
        "{adapter: {lora: {dora: [true], train.learning_rate: {low: 0.005, high: 0.02}},"
        " ia3: {train.learning_rate: {low: 0.005, high: 0.02}}, reft: {},"
        " full: {train.learning_rate: {low: 0.01, high: 0.02}}}}"
    )
    run = search(space, sampler="random", trials=10)
    said = capfd.readouterr().out
    trials = trials_of(run)
    assert {t.params["adapter.kind"] for t in trials} == {"lora", "ia3", "reft", "full"}
    assert all((t.state.name, t.user_attrs["steps"]) == ("COMPLETE", 6) for t in trials)
    for word in ("lora with DoRA", "ia3", "full"):
        assert said.count(f"{word}: no stack holds") == 1
    assert "reft: no stack" not in said
    best = facts_of(run)["search"]["best"]
    assert best["values"]["adapter.kind"] == "full" and (run / "model").is_dir() and not (run / "adapters").exists()
    loaded = load_run(run)
    rows = prepare(read_recipe(here / "search.yaml")).rows
    assert held_out_loss(loaded.model, loaded.base.tokenizer, rows.valid).loss == pytest.approx(best["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_trial_alone_is_pruned_at_the_step_of_its_evaluation(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.search.study import Study

    def is_bad(study: Study, number: int) -> bool:
        return number > 0 and len(study.trials()[number].intermediate_values) == 2

    monkeypatch.setattr(Study, "should_prune", is_bad)
    run = search("{adapter: {ia3: {}}, train.learning_rate: {low: 0.005, high: 0.02}}", train=LONG, trials=2)
    pruned = trials_of(run)[1]
    assert pruned.state.name == "PRUNED" and len(pruned.intermediate_values) == 2
    assert pruned.user_attrs["steps"] == 4 and pruned.user_attrs["steps_planned"] == 16
    assert pruned.user_attrs["n_tokens"] > 0 and pruned.user_attrs["best_step"] in (2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "ia3"])  # in a stack, and alone
def test_no_trial_is_judged_while_its_learning_rate_rises(
    search: Search, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from toolkit.search.study import Study

    monkeypatch.setattr(Study, "should_prune", lambda study, number: number > 0)
    train = "train: {max_steps: 24, batch_size: 4, evaluate_every: 0.2, warmup_ratio: 0.5, early_stop_patience: null}"
    space = f"{{adapter: {{{kind}: {{}}}}, train.learning_rate: {{low: 0.005, high: 0.02}}}}"
    pruned = trials_of(search(space, train=train, trials=2))[1]
    assert (pruned.state.name, pruned.user_attrs["steps_planned"], pruned.user_attrs["steps"]) == ("PRUNED", 24, 14)
    assert len(pruned.intermediate_values) == 7


@pytest.mark.slow
def test_pruning_saves_steps(search: Search) -> None:
    run = search(train=LONG, pruner="successive_halving", trials=10, sampler="random", side_by_side=3)
    steps, states = facts_of(run)["search"]["steps"], facts_of(run)["search"]["trials"]
    pruned = [t for t in trials_of(run) if t.state.name == "PRUNED"]
    assert states["pruned"] == len(pruned) > 0
    assert steps["saved_by_pruning"] == sum(16 - t.user_attrs["steps"] for t in pruned) > 0
    assert steps["taken"] == 160 - steps["saved_by_pruning"]
    assert "saved" in (run / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_weights_of_files_are_searched(search: Search, here: Path) -> None:
    write_talk(here / "more.jsonl", first=100)
    run = search(
        "{data.train.1.weight: [0.5, 2.0]}",
        "data.train=[talk.jsonl,more.jsonl]",
        train=EPOCHS,
        sampler="grid",
        trials=2,
    )
    planned = {t.params["data.train.1.weight"]: t.user_attrs["steps_planned"] for t in trials_of(run)}
    parts = facts_of(run)["data"]["parts"]
    assert planned[2.0] > planned[0.5] and set(planned) == {0.5, 2.0} and parts["train"] == 76


@pytest.mark.slow
def test_lengths_are_searched_and_one_that_leaves_nothing_fails_its_trial(search: Search) -> None:
    run = search("{train.max_length: [4, 24, 64]}", sampler="grid", trials=3)
    by_length = {t.params["train.max_length"]: t for t in trials_of(run)}
    assert by_length[4].state.name == "FAIL" and "train.max_length" in by_length[4].user_attrs["reason"]
    assert by_length[24].user_attrs["n_tokens"] < by_length[64].user_attrs["n_tokens"]
    assert facts_of(run)["search"]["trials"] | {"running": 0} == {
        "complete": 2, "pruned": 0, "failed": 1, "lost": 0, "running": 0
    }  # fmt: skip


@pytest.mark.slow
def test_trials_are_judged_on_the_same_rows_whatever_their_length(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    members: list[Member] = []
    make = Crew._member

    def noting(self: Crew, asked: Any) -> Member:
        members.append(make(self, asked))
        return members[-1]

    monkeypatch.setattr(Crew, "_member", noting)
    search("{train.max_length: [24, 64]}", "train.max_length=64", sampler="grid", trials=2)
    assert len(members) == 2 and members[0].valid == members[1].valid
    assert max(len(ids) for ids, _ in members[0].valid) > 24
    assert sorted(max(len(ids) for ids, _ in member.rows) > 24 for member in members) == [False, True]


# The test split


@pytest.mark.slow
def test_the_test_split_is_looked_at_once_and_changes_no_trial(
    search: Search, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    measure = Judge.measure
    monkeypatch.setattr(Judge, "measure", lambda self, model: measured.append(model) or measure(self, model))
    values = []
    write_talk(here / "held.jsonl", first=200, n_rows=6)
    for first in (300, 400):
        write_talk(here / "other.jsonl", first=first)
        measured.clear()
        run = search(RATES, "data.valid=[held.jsonl]", "data.test=[other.jsonl]")
        assert len(measured) == 2 and measured[0] is not measured[1]  # the base, and the best trial
        values.append([trial.intermediate_values for trial in trials_of(run)])
    assert values[0] == values[1]


# Rows are rendered once


@pytest.mark.slow
def test_a_second_search_over_the_same_talk_renders_nothing(
    search: Search, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(trials=1)
    told = trials_of(first)[0].intermediate_values

    def refuse(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(cached, "render_rows", refuse)
    assert trials_of(search(trials=1))[0].intermediate_values == told
    monkeypatch.undo()
    monkeypatch.chdir(here)
    with pytest.raises(AssertionError, match="rendered again"):
        monkeypatch.setattr(cached, "render_rows", refuse)
        search(RATES, "data.clean.min_turns=3", trials=1)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "empty", "no_facts", "other"])
def test_a_damaged_cache_of_rows_is_made_anew(search: Search, here: Path, damage: str) -> None:
    first = search(trials=1)
    told = trials_of(first)[0].intermediate_values
    (file,) = (disk.cache_folder() / "rows").glob("*.safetensors")
    whole = file.read_bytes()
    if damage in ("cut", "empty"):
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    else:
        from safetensors.torch import save_file

        save_file({"entry": torch.zeros(2)}, file, None if damage == "no_facts" else {"facts": "{}"})
    assert trials_of(search(trials=1))[0].intermediate_values == told
    assert file.read_bytes() == whole


def test_rows_of_a_hub_are_not_kept(here: Path) -> None:
    recipe = read_recipe(here / "search.yaml")
    base = prepare(recipe).base
    before = contents(disk.cache_folder())
    for data in ({"hub:누구/말": "hub:누구/말"}, {"talk.jsonl": "f" * 64}):
        rows = cached.CachedRows(recipe, base, data)
        assert len(rows.of(recipe).train) == 38
    assert len(contents(disk.cache_folder())) == len(before) + 1  # of the file
