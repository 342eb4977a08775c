"""A run that trains leaves its report, with what it learned from and how much memory it took."""

from pathlib import Path

import pytest

from toolkit.bundle import Run
from toolkit.train import main

pytestmark = pytest.mark.slow  # trains


def test_a_run_leaves_its_report(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(recipe_file), "--runs", str(tmp_path / "runs")]
    assert main(command) == 0
    assert "report.html: all of it on one page" in capsys.readouterr().out
    run = Run(tmp_path / "runs" / "tiny")
    facts = run.facts()
    assert facts["memory_mb"] > 100
    assert facts["data"]["tokens"]["train"]["longest"] <= 512 and facts["data"]["spoken"]["user"]["ko"]["n"] > 0
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert f"{facts['data']['tokens']['train']['total']:,}" in page
    (run.path / "report.html").unlink()
    assert main(command) == 0  # finished already: what is missing is written again
    assert (run.path / "report.html").read_text(encoding="utf-8") == page
