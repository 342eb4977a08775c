"""The benchmark of ten adapters: every system of every field runs, on made-up talk and for a second each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ten_adapters.py"
WAYS = {"full": {"alone"}, "lora": {"alone"}, "boost": {"weighted"}}
VOTES = {"hard", "soft", "logprob"}

pytestmark = pytest.mark.slow


def run(out: Path, *more: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(SCRIPT), "--tiny", "--seconds", "0.5", "--out", str(out), *more]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return results, done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ten") / "결과.json"


@pytest.fixture(scope="module")
def found(out: Path) -> tuple[dict[str, Any], str]:
    return run(out, "--only", "nsmc", "talk", "full", "lora", "bag", "seeds", "boost", "cost")


def test_every_system_is_judged_on_the_same_conversations(found: tuple[dict[str, Any], str]) -> None:
    runs = found[0]["runs"]
    assert len(runs) == 10 and found[0]["surroundings"]["versions"]["torch"] and found[0]["seeds"] == [0]
    for key, one in runs.items():
        field, system, _ = key.split()
        wanted = WAYS.get(system, VOTES - ({"hard"} if field == "talk" else set()))
        assert set(one["sums"]) == wanted and one["steps"] >= 2 and one["seconds"] > 0
        assert {len(sums) for sums in one["sums"].values()} == {16}
        if field == "nsmc":
            assert all(set(signs) <= {"0", "1"} for signs in one["sums"].values())


def test_members_are_judged_alone_and_out_of_their_bag(found: tuple[dict[str, Any], str]) -> None:
    one = found[0]["runs"]["nsmc bag 0"]
    assert one["each alone"]["best"] <= one["each alone"]["mean"] <= one["each alone"]["worst"]
    assert 0 < one["out of bag"]["n"] <= 64
    assert found[0]["runs"]["nsmc seeds 0"]["out of bag"] is None


def test_the_tables_compare_everybody_with_one_effort_and_say_what_ten_cost(
    found: tuple[dict[str, Any], str],
) -> None:
    said = found[1]
    for label in ("full alone", "lora alone", "bag hard", "seeds logprob", "boost weighted"):
        (line,) = (line for line in said.split("| nsmc |")[1].split("\n\n")[0].splitlines() if f"| {label} |" in line)
        assert line.count("to") == 2 - (label in ("full alone", "lora alone"))
    assert {len(one[way]) for one in found[0]["cost"].values() for way in ("planned", "all at once", "fit/one")} == {1}
    assert "of the steps of fit/one" in said


def test_what_is_there_is_kept_and_other_settings_are_refused(found: tuple[dict[str, Any], str], out: Path) -> None:
    again, said = run(out, "--only", "nsmc", "lora")
    assert again["runs"] == found[0]["runs"] and "steps in" not in said.split("|")[0]
    command = [sys.executable, str(SCRIPT), "--tiny", "--seconds", "0.7", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    )
    assert done.returncode == 1 and "other settings" in done.stderr
