"""What a report warns of: every rule speaks when it should, and keeps silent of a sound run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report_world import curve, facts, make_run, with_experts, with_search
from toolkit.report.doubts import doubts_of
from toolkit.report.seen import see

Change = Callable[[dict[str, Any]], object]


def told(path: Path, change: Change = lambda _: None, lines: Any = None) -> list[str]:
    of = facts()
    change(of)
    return [doubt.en for doubt in doubts_of(see(make_run(path / "tiny", of, lines)))]


def test_of_a_sound_run_nothing_is_doubted(tmp_path: Path) -> None:
    assert told(tmp_path) == []


def after(of: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = of["results"]["after"]
    return found


CHANGES: dict[str, tuple[Change, str]] = {
    "worse": (lambda of: after(of)["loss"].update(ko=9.0), "rose from 5.200 to 9 (Korean)"),
    "unended": (lambda of: after(of)["samples"][0].update(finish="length"), "25 % of the answers do not end"),
    "empty": (lambda of: after(of)["samples"][0].update(answer=" "), "25 % of the answers are empty"),
    "same": (
        lambda of: after(of).update(samples=[{"name": str(n), "answer": "네", "prompt": "?"} for n in range(6)]),
        "6 of 6 prompts got the same answer",
    ),
    "repeats": (lambda of: after(of)["repetition"].update(all=0.4), "40 % of their 4-grams"),
    "baseline": (
        lambda of: after(of).update({"accuracy": {"all": 0.5}, "baselines": {"naive Bayes accuracy": 0.8}}),
        "naive Bayes alone reaches an accuracy of 0.800",
    ),
    "written": (
        lambda of: [of["results"][part].update({"spoken sentences": {"all": share}}) for part, share in
                    (("before", 0.9), ("after", 0.4))],
        "slid into written style: 40 %",
    ),
    "few": (lambda of: of["data"]["parts"].update(test=1), "Only 1 held-out conversation:"),
    "no test": (lambda of: of["data"]["parts"].update(test=0, valid=50), "data.test is 0"),
    "none": (lambda of: of["data"]["parts"].update(test=0, valid=0), "No talk was held out"),
    "dropped": (lambda of: of["data"]["dropped"].update(too_long=5), "5.0 % of the conversations were dropped"),
    "twice": (lambda of: of["data"].update(dropped={"exact_duplicate": 50}), "Duplicates do no harm"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "wanted"), CHANGES.values(), ids=list(CHANGES))
def test_a_doubt_is_told(tmp_path: Path, change: Change, wanted: str) -> None:
    found = told(tmp_path, change)
    assert len(found) == 1 and wanted in found[0]


def test_a_first_evaluation_that_stayed_the_best_is_told(tmp_path: Path) -> None:
    found = told(tmp_path, lambda of: of["fit"].update(stopped="early", best_step=4))
    assert len(found) == 1 and "very first evaluation" in found[0]


def test_a_held_out_loss_that_rose_again_is_told(tmp_path: Path) -> None:
    lines = [*curve(), {"step": 41, "valid_loss": 4.5}]
    found = told(tmp_path, lines=lines)
    assert len(found) == 1 and "rose again, from 4.000 to 4.500" in found[0]


def test_a_loss_that_rose_while_learning_is_told(tmp_path: Path) -> None:
    lines = [line for line in curve(first=4.0, last=9.0) if "loss" in line]
    assert any("learning rate is too high" in doubt for doubt in told(tmp_path, lines=lines))


@pytest.mark.parametrize(
    ("kind", "report", "helps", "wanted"),
    [
        ("mix", {}, False, "The combination does not help beyond chance: 반말 alone has 4.3000"),
        ("route", {"after 1": {"accuracy": 0.4}}, True, "the right expert in 40 % of texts"),
        (
            "route",
            {"labels": ["반말", "polite", "other"], "all": {"confusion": [[0, 16, 4], [1, 90, 0]]}},
            True,
            "The router sends 반말 only 0 of the 20 texts",
        ),
        ("gate", {"load": {"반말": 0.96, "polite": 0.04}}, True, "gives 반말 96 % of the weight"),
    ],
)
def test_a_combination_is_doubted(tmp_path: Path, kind: str, report: dict[str, Any], helps: bool, wanted: str) -> None:
    run = make_run(tmp_path / "tiny")
    with_experts(run, kind, "how", report, helps=helps)
    found = [doubt.en for doubt in doubts_of(see(run))]
    assert len(found) == 1 and wanted in found[0]


def test_an_expert_that_is_not_best_on_its_own_talk_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    with_experts(run, "mix", "prob", {})
    combination = run.facts()["combination"]
    combination["on"]["polite"]["반말"] = 3.0
    run.update(combination=combination)
    found = [doubt.en for doubt in doubts_of(see(run))]
    assert found == ["On polite's own talk 반말 is better (3 against 4.100)."]


def test_a_best_value_at_the_end_of_its_range_is_told(tmp_path: Path) -> None:
    of = facts()
    of["inputs"]["recipe"] |= {
        "search.space.train.learning_rate.low": 0.0005,
        "search.space.train.learning_rate.high": 0.01,
        "search.space.train.learning_rate.log": True,
    }
    run = make_run(tmp_path / "tiny", of)
    with_search(run)
    found = [doubt.en for doubt in doubts_of(see(run))]
    assert found == ["The best train.learning_rate (0.0099) lies at the upper end of its range: look beyond it."]


def test_trials_that_failed_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    with_search(run)
    search = run.facts()["search"]
    search["trials"]["failed"] = 3
    run.update(search=search)
    assert [doubt.en for doubt in doubts_of(see(run))] == [
        "3 of 8 trials failed; the reasons stand in search/trials.csv."
    ]
