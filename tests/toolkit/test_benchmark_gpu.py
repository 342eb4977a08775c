"""The benchmark that wants a GPU: every part of it runs, on a tiny shape without one."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
PARTS = ("equality", "speed", "search", "packing", "qlora")

pytestmark = pytest.mark.slow


def run(out: Path, *more: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(out), *more]
    done = subprocess.run(
        command, cwd=out.parent, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.json")
    results: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return results, done.stdout


def parts_of(results: Mapping[str, Any], state: str) -> Sequence[str]:
    return [part for part, one in results["parts"].items() if one["state"] == state]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu") / "결과"


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return run(out, "--parts", *PARTS)[0]


def test_every_part_runs_without_an_error(results: dict[str, Any]) -> None:
    assert parts_of(results, "done") == list(PARTS)
    assert not [part for part, one in results["parts"].items() if "error" in one or "cut_short" in one]
    assert {row[0] for row in results["table"]} == {"part", "---", *PARTS}
    assert results["surroundings"]["card"] and results["surroundings"]["versions"]["peft"]


def test_rows_of_every_kind_are_compared_in_every_type_and_way(results: dict[str, Any]) -> None:
    cases = results["parts"]["equality"]["cases"]
    assert list(cases) == ["fp32", "bf16", "bf16 under autocast"]
    kinds = {"lora", "lora-8", "prefix", "reft", "embedding"}
    for ways in cases.values():
        assert {way: set(ones) for way, ones in ways.items()} == {
            "whole": kinds | {"base"}, "cached": kinds | {"base"}, "gradients": kinds
        }  # fmt: skip


def test_every_number_of_owners_and_of_learning_adapters_is_timed(results: dict[str, Any]) -> None:
    speed, search = (results["parts"][part]["cases"] for part in ("speed", "search"))
    wanted = [(8, (1, 2, 4, 8)), (32, (1, 2, 4, 8, 16, 32)), (64, (64,))]
    assert list(speed) == [f"{rows} rows, {distinct} distinct" for rows, every in wanted for distinct in every]
    assert all(set(one["rounds"][0]) == {"base", "peft-one", "peft-names", "stack"} for one in speed.values())
    assert {key.split(",")[0] for key in search} == {f"K = {count}" for count in (1, 2, 4, 8, 16)}


def test_what_is_finished_is_not_run_again_and_what_does_not_fit_is_left_out(
    results: dict[str, Any], out: Path
) -> None:
    again, said = run(out, "--budget", "0")
    assert again["parts"] == results["parts"]
    assert said.count("finished before") == len(PARTS)
    nothing, _ = run(out.parent / "none", "--budget", "0")
    assert parts_of(nothing, "left out") == list(PARTS)
