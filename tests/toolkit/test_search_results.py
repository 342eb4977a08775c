"""What a search leaves behind: facts, trials.csv, best.yaml, plots.html, the card's section."""

import csv
import json
import logging
import math
import random
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from toolkit.errors import DiskError
from toolkit.recipe.model import Recipe
from toolkit.recipe.read import read_recipe
from toolkit.search.facts import facts_of
from toolkit.search.results import search_markdown, write_results
from toolkit.search.trials import lowest_loss

HEAD = "name: {name}\nbase: {{model: spoken-mini}}\ndata: {{train: ['maltu:probes.jsonl']}}\nsearch: {{{search}}}\n"
PLAIN = "space: {train.learning_rate: {low: 1.0e-5, high: 1.0e-2, log: true}, train.batch_size: [4, 8, 16]}"
KINDS = (
    "space: {train.learning_rate: {low: 1.0e-5, high: 1.0e-2, log: true},"
    " adapter: {lora: {rank: [4, 8]}, prefix: {tokens: {low: 4, high: 64}}, reft: {}}}"
)
WORDS = ["친구처럼 말해", "</script><b>=1+1"]
RATE = FloatDistribution(1e-5, 1e-2, log=True)
SPACE: dict[str, BaseDistribution] = {
    "train.learning_rate": RATE,
    "train.batch_size": CategoricalDistribution([4, 8, 16]),
    "train.schedule": CategoricalDistribution(["cosine", "linear"]),
    "adapter.kind": CategoricalDistribution(["lora", "prefix", "reft"]),
    "prefix/init_text": CategoricalDistribution(WORDS),
    "lora/rank": CategoricalDistribution([4, 8]),
    "prefix/tokens": IntDistribution(4, 64),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    def read(search: str = PLAIN, name: str = "mine") -> Recipe:
        file = tmp_path / "recipe.yaml"
        file.write_text(HEAD.format(name=name, search=search), encoding="utf-8")
        return read_recipe(file, to_run=False)

    return read


def add(
    study: optuna.Study,
    loss: float | None,
    params: Mapping[str, Any],
    state: TrialState = TrialState.COMPLETE,
    curve: Mapping[int, float] | None = None,
    **facts: Any,
) -> None:
    """One trial, as a study of ours holds it."""
    trial = optuna.create_trial(
        state=state,
        value=loss,
        params=dict(params),
        distributions={name: SPACE[name] for name in params},
        user_attrs=facts,
        intermediate_values=dict(curve or {}),
    )
    study.add_trial(trial)


def tried(rate: float = 0.001, batch: int = 8) -> dict[str, Any]:
    return {"train.learning_rate": rate, "train.batch_size": batch}


def mixed() -> optuna.Study:
    """Trials that ended in every way."""
    study = optuna.create_study()
    add(study, 2.5, tried(0.001, 4), curve={5: 3.0, 10: 2.5}, steps=10, steps_planned=10, seconds=4.0)
    add(study, 3.5, tried(0.01, 8), TrialState.PRUNED, {5: 3.5}, steps=5, steps_planned=20, seconds=2.0)
    add(study, None, tried(0.002, 16), TrialState.FAIL, {5: 9.0}, steps=7, steps_planned=10, reason="not finite")
    add(study, None, tried(0.003, 4), TrialState.FAIL, {5: 1.0}, steps=3, steps_planned=10, reason="lost")
    add(study, None, tried(0.003, 4), TrialState.FAIL, reason="twice", again_of=3)
    add(study, 2.25, tried(0.003, 4), curve={5: 2.75, 10: 2.25}, steps=10, steps_planned=10, again_of=3, seconds=5.0)
    return study


def many(n: int, *, with_kinds: bool = False, pruned: bool = True) -> optuna.Study:
    """Trials whose loss hangs on the learning rate, and far less on anything else."""
    study, draw = optuna.create_study(), random.Random(7)
    for number in range(n):
        params = tried(10 ** draw.uniform(-5, -2), draw.choice([4, 8, 16]))
        if with_kinds:
            params["adapter.kind"] = draw.choice(["lora", "prefix", "reft"])
            params |= {"lora": {"lora/rank": draw.choice([4, 8])}, "prefix": {"prefix/tokens": 16}, "reft": {}}[
                params["adapter.kind"]
            ]
        loss = 2 + (math.log10(params["train.learning_rate"]) + 3) ** 2 + draw.gauss(0, 0.01)
        is_pruned = pruned and loss > 3
        state = TrialState.PRUNED if is_pruned else TrialState.COMPLETE
        add(study, loss, params, state, {5: loss + 0.5, 10: loss}, seconds=1.0 + number)
    return study


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_best_is_the_lowest_loss_of_a_trial_that_was_trained_to_the_end(recipe: Callable[..., Recipe]) -> None:
    facts = facts_of(mixed().get_trials(), recipe())
    best = {"number": 5, "loss": 2.25, "values": {"train.learning_rate": 0.003, "train.batch_size": 4}, "seconds": 5.0}
    assert facts["best"] == best
    assert [one["number"] for one in facts["best_trials"]] == [5, 0]


def test_trials_are_counted_by_how_they_ended_and_repeated_ones_apart(recipe: Callable[..., Recipe]) -> None:
    facts = facts_of(mixed().get_trials(), recipe())
    assert facts["trials"] == {"complete": 2, "pruned": 1, "failed": 1, "lost": 1, "running": 0}


def test_pruning_saved_the_steps_that_pruned_trials_did_not_take(recipe: Callable[..., Recipe]) -> None:
    steps = facts_of(mixed().get_trials(), recipe())["steps"]
    assert steps == {"taken": 35, "planned": 50, "saved_by_pruning": 15, "saved_share": 0.3}


def test_the_facts_are_plain_json(recipe: Callable[..., Recipe]) -> None:
    facts = facts_of(many(30).get_trials(), recipe())
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_a_pause_between_two_starts_is_not_counted_as_time(recipe: Callable[..., Recipe]) -> None:
    study = optuna.create_study()
    add(study, 2.0, tried())
    add(study, 2.0, tried())
    first, second = study.get_trials()
    assert first.datetime_start is not None and second.datetime_start is not None
    day = 86_400
    for trial, start in ((first, 0.0), (second, day)):
        moved = trial.datetime_start.fromtimestamp(1_700_000_000 + start)
        trial.datetime_start = moved
        trial.datetime_complete = moved.fromtimestamp(1_700_000_000 + start + 30)
    fresh = optuna.create_study()
    fresh.add_trials([first, second])
    assert facts_of(fresh.get_trials(), recipe())["seconds"] == 60.0


def test_a_few_trials_give_no_importances_but_a_sentence(recipe: Callable[..., Recipe]) -> None:
    facts = facts_of(many(9).get_trials(), recipe())
    assert facts["importances"] == {}
    assert facts["importances_note"].startswith("Too few trials to tell what mattered: 9 with a loss")


@pytest.mark.parametrize("with_kinds", [False, True], ids=["plain", "conditional"])
def test_what_mattered_most_comes_first_pruned_trials_included(recipe: Callable[..., Recipe], with_kinds: bool) -> None:
    facts = facts_of(many(24, with_kinds=with_kinds).get_trials(), recipe(KINDS if with_kinds else PLAIN))
    importances = facts["importances"]
    assert next(iter(importances)) == "train.learning_rate"
    assert importances["train.learning_rate"] > 0.5
    assert sum(importances.values()) == pytest.approx(1, abs=0.001)
    assert facts["trials"]["pruned"] > facts["trials"]["complete"] / 2


def test_equal_losses_give_no_importances(recipe: Callable[..., Recipe]) -> None:
    study = optuna.create_study()
    for _ in range(12):
        add(study, 2.0, {"train.batch_size": 8})
    facts = facts_of(study.get_trials(), recipe())
    assert facts["importances"] == {} and "No parameter" in facts["importances_note"]


def test_kinds_are_compared_by_their_best_trial(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    study = optuna.create_study()
    lora = {"adapter.kind": "lora", "lora/rank": 8, "train.learning_rate": 0.002}
    add(study, 2.4, {**lora, "lora/rank": 4}, parameters=50, seconds=8.0, memory_mb=90.0)
    add(study, 2.2, lora, parameters=100, seconds=9.0, memory_mb=99.0)
    add(study, 2.3, {"adapter.kind": "reft"}, parameters=10, seconds=7.0)
    add(study, 3.0, {"adapter.kind": "prefix", "prefix/tokens": 8}, TrialState.PRUNED, {5: 3.0}, parameters=30)
    facts = write_results(study, tmp_path, recipe(KINDS))
    told = [(one["kind"], one["loss"], one["state"], one["parameters"], one["memory_mb"]) for one in facts["kinds"]]
    assert told == [
        ("lora", 2.2, "complete", 100, 99.0),
        ("reft", 2.3, "complete", 10, None),
        ("prefix", 3.0, "pruned", 30, None),
    ]
    assert facts["best"]["values"] == {"adapter.kind": "lora", "adapter.rank": 8, "train.learning_rate": 0.002}
    text = (tmp_path / "plots.html").read_text(encoding="utf-8")
    assert "Kinds of adapter compared" in text and "3.0000 (ended early)" in text
    assert "| lora | 2.2000 | 1 | 100 | 9.0 s | 99 MB | 2 |" in search_markdown(facts)


def test_the_best_recipe_runs_as_it_is_without_a_search(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    study = optuna.create_study()
    add(study, 2.0, {"train.learning_rate": 0.002, "adapter.kind": "prefix", "prefix/tokens": 24})
    write_results(study, tmp_path, recipe(KINDS, "말투"))
    best = read_recipe(tmp_path / "best.yaml")
    assert (best.name, best.search) == ("말투_best", None)
    assert (best.adapter.kind, best.train.learning_rate) == ("prefix", 0.002)
    assert best.adapter.model_dump()["tokens"] == 24
    lines = (tmp_path / "best.yaml").read_text(encoding="utf-8").splitlines()
    assert not any(line.startswith("search") for line in lines)
    assert lines[0] == "# python -m toolkit.train 'runs/말투/search/best.yaml'"


def test_a_name_that_fills_its_bytes_is_cut_at_a_letter(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    study = optuna.create_study()
    add(study, 2.0, tried())
    write_results(study, tmp_path, recipe(name="a" + "말" * 66))
    assert read_recipe(tmp_path / "best.yaml").name == "a" + "말" * 64 + "_best"


def test_the_table_has_a_row_a_trial_and_a_column_a_recipe_key(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    write_results(mixed(), tmp_path, recipe())
    rows = rows_of(tmp_path)
    assert [row["state"] for row in rows] == ["complete", "pruned", "fail", "fail", "complete"]
    assert rows[1]["loss"] == "" and float(rows[1]["lowest_loss"]) == 3.5
    assert float(rows[4]["train.learning_rate"]) == 0.003 and rows[4]["again_of"] == "3"
    assert rows[2]["reason"] == "not finite"


def test_keys_of_a_conditional_space_share_a_column(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    write_results(many(12, with_kinds=True), tmp_path, recipe(KINDS))
    for row in rows_of(tmp_path):
        assert (row["adapter.rank"] != "") == (row["adapter.kind"] == "lora")


def test_no_text_of_the_table_is_a_formula(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    study = optuna.create_study()
    add(study, -0.5, tried())
    for reason in ('=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\t=1"):
        add(study, None, tried(), TrialState.FAIL, reason=reason)
    write_results(study, tmp_path, recipe())
    rows = rows_of(tmp_path)
    assert all(row["reason"].startswith("'") for row in rows[1:])
    assert rows[0]["loss"] == "-0.5"


@pytest.mark.parametrize("n_failed", [0, 3], ids=["no trial", "failed ones only"])
def test_without_a_loss_everything_but_the_best_recipe_is_written(
    tmp_path: Path, recipe: Callable[..., Recipe], n_failed: int
) -> None:
    study = optuna.create_study()
    for _ in range(n_failed):
        add(study, None, tried(), TrialState.FAIL, {5: math.nan}, reason="loss is nan")
    facts = write_results(study, tmp_path, recipe())
    assert facts["best"] is None and facts["best_trials"] == []
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "trials.csv", "plots.html"}
    assert "No trial ended with a loss." in (tmp_path / "plots.html").read_text(encoding="utf-8")
    assert "None of them was trained to the end" in search_markdown(facts)


def test_losses_that_are_not_finite_are_no_losses(recipe: Callable[..., Recipe]) -> None:
    study = optuna.create_study()
    add(study, math.inf, tried())
    add(study, 2.0, tried(), curve={5: math.nan, 10: math.inf, 15: 2.0})
    facts = facts_of(study.get_trials(), recipe())
    assert [one["number"] for one in facts["best_trials"]] == [1]


def test_the_lowest_loss_of_a_pruned_trial_is_a_finite_one() -> None:
    study = optuna.create_study()
    add(study, 3.5, tried(), TrialState.PRUNED, {5: -math.inf, 10: 3.0, 15: math.nan, 20: 3.5})
    add(study, None, tried(), TrialState.FAIL, {5: math.nan})
    assert [lowest_loss(trial) for trial in study.get_trials()] == [3.0, None]


def test_trials_that_run_are_told_as_running(recipe: Callable[..., Recipe]) -> None:
    study = mixed()
    study.ask().suggest_categorical("train.batch_size", [4, 8, 16])
    assert facts_of(study.get_trials(), recipe())["trials"]["running"] == 1


def test_nothing_of_optuna_reaches_the_user(
    tmp_path: Path, recipe: Callable[..., Recipe], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    optuna.logging.set_verbosity(logging.DEBUG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for number, study in enumerate((optuna.create_study(), mixed(), many(24))):
                capfd.readouterr()
                caplog.clear()
                (tmp_path / str(number)).mkdir()
                write_results(study, tmp_path / str(number), recipe())
                assert capfd.readouterr() == ("", "")
                assert not [one for one in caplog.records if one.name.startswith("optuna")]
        assert optuna.logging.get_verbosity() == logging.DEBUG
    finally:
        optuna.logging.set_verbosity(logging.INFO)


def test_the_page_holds_plotly_once_and_forbids_every_request(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    write_results(many(24), tmp_path, recipe(name="말투_찾기"))
    text = (tmp_path / "plots.html").read_text(encoding="utf-8")
    assert text.count("* plotly.js v") == 1
    assert "default-src 'none'" in text and not re.search(r"<(script|link|img)[^>]*(src|href)=", text)
    assert "<h1>말투_찾기: search</h1>" in text


def test_a_value_cannot_leave_its_place_in_the_page(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    study = optuna.create_study()
    for text in WORDS:
        add(study, 2.0, {"adapter.kind": "prefix", "prefix/init_text": text})
    space = f"space: {{adapter: {{prefix: {{init_text: {json.dumps(WORDS)}}}, lora: {{}}}}}}"
    write_results(study, tmp_path, recipe(space))
    assert "</script><b>" not in (tmp_path / "plots.html").read_text(encoding="utf-8")


def test_results_written_again_replace_the_old_ones(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    study = mixed()
    write_results(study, tmp_path, recipe())
    add(study, 1.0, tried(0.0045, 16))
    write_results(study, tmp_path, recipe())
    assert len(rows_of(tmp_path)) == 6
    assert read_recipe(tmp_path / "best.yaml").train.learning_rate == 0.0045


def test_a_folder_that_is_gone_is_an_error_of_the_disk(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(DiskError, match=r"trials\.csv"):
        write_results(mixed(), tmp_path / "gone", recipe())


def test_the_card_names_values_the_best_five_and_what_pruning_saved(recipe: Callable[..., Recipe]) -> None:
    text = search_markdown(facts_of(mixed().get_trials(), recipe()))
    assert "- `train.learning_rate`: `0.003`" in text
    assert "| trial | held-out loss | learning_rate | batch_size |" in text
    assert "| 5 | 2.2500 | `0.003` | `4` |" in text
    assert "saved 15 of 50 planned optimizer steps (30 %)" in text
    assert "    optuna-dashboard runs/mine/search/journal.log" in text


def test_a_password_of_the_storage_is_told_nowhere(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    url = "postgresql://me:geheim@db.example:5432/trials?password=geheim"
    facts = write_results(many(12), tmp_path, recipe(f"storage: '{url}', {PLAIN}"))
    written = [path.read_text(encoding="utf-8") for path in tmp_path.iterdir() if path.name != "recipe.yaml"]
    assert not any("geheim" in text for text in [*written, json.dumps(facts), search_markdown(facts)])
    assert "optuna-dashboard 'postgresql+psycopg://me:***@db.example:5432/trials'" in search_markdown(facts)


def test_a_value_cannot_break_the_card(recipe: Callable[..., Recipe]) -> None:
    facts = facts_of(mixed().get_trials(), recipe())
    facts["best_trials"][0]["values"]["train.batch_size"] = "a|b`c\nd"
    assert "| `a\\|b'c d` |" in search_markdown(facts)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_without_network_draws_every_plot(tmp_path: Path, recipe: Callable[..., Recipe], scheme: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    write_results(many(24, with_kinds=True), tmp_path, recipe(KINDS, "말투_찾기"))
    said: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(color_scheme=scheme, offline=True).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith("file:") else said.append(request.url))
        page.goto(f"file://{tmp_path}/plots.html")
        page.wait_for_selector("#plot-4 .bars")
        ink, paper = (
            page.evaluate(f"getComputedStyle(document.querySelector('{part}')).{color}")
            for part, color in (("#plot-0 .xtick text", "fill"), ("body", "backgroundColor"))
        )
        heading = page.text_content("h1")
        browser.close()
    assert said == []
    assert heading == "말투_찾기: search"
    assert abs(brightness(ink) - brightness(paper)) > 150


def brightness(color: str) -> float:
    """Of `rgb(…)`, from 0 to 255."""
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3
