"""A curve for each that learned beside others, on the page of their run."""

import json
from pathlib import Path
from typing import Any

from tests.report_world import curve, make_run, with_experts
from toolkit.report.learned import MOST_LINES, curves_section
from toolkit.report.seen import see
from toolkit.report.write import report_page


def lines_of(*names: str) -> list[dict[str, Any]]:
    """Steps 1 to 8 of each, measured at two of them."""
    steps: list[dict[str, Any]] = [
        {"step": step, **{f"loss/{name}": 5.0 - step / 9 for name in names}} for step in range(1, 9)
    ]
    return [*steps, *({"step": step, **{f"valid_loss/{name}": 4.0 + step / 9 for name in names}} for step in (4, 8))]


def test_each_member_has_its_curves_by_its_own_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "여럿", lines=[*lines_of("반말", "polite"), {"step": 16, "test/loss": 4.0}])
    with_experts(run, "mix", "logprob", {})
    seen = see(run)
    assert seen.learners() == ["반말", "polite"]
    assert seen.points("loss/반말")[-1] == (8, 5.0 - 8 / 9) and seen.points("valid_loss/polite")[0][0] == 4
    page = report_page(seen)
    assert page.count("<figure") >= 2 and "Held-out loss while learning" in page
    assert "반말 4.889, polite 4.889" in page and "The gate" not in page


def test_a_gate_that_learned_after_them_has_its_own(tmp_path: Path) -> None:
    gate = [{"step": step, "gate/loss": 4.0, "gate/valid_loss": 3.5} for step in range(1, 5)]
    drawn = curves_section(see(make_run(tmp_path / "run", lines=[*lines_of("하나"), *gate])))
    assert "The gate" in drawn and "valid_loss 3.500" in drawn


def test_a_member_on_a_base_of_its_own_is_drawn_from_its_own_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lines=lines_of("tuned"))
    folder = run.path / "experts" / "far"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve(20)), encoding="utf-8")
    seen = see(run)
    assert seen.learners() == ["tuned", "far"] and len(seen.points("loss/far")) == 20
    assert seen.points("loss") == []


def test_of_many_only_some_are_drawn_and_the_rest_is_told(tmp_path: Path) -> None:
    names = [f"member-{number}" for number in range(1, MOST_LINES + 4)]
    drawn = curves_section(see(make_run(tmp_path / "run", lines=lines_of(*names))))
    assert f"member-{MOST_LINES} " in drawn and f"member-{MOST_LINES + 1} " not in drawn
    assert "3 more are in metrics.jsonl" in drawn


def test_a_run_of_one_adapter_has_its_one_curve_as_before(tmp_path: Path) -> None:
    seen = see(make_run(tmp_path / "run"))
    assert seen.learners() == [] and "Every curve counts its own steps" not in curves_section(seen)
