"""Runs are found by path or name; those that no server can hold together are refused with the command to serve them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from serve.runs import WHOLE_MODEL, find_runs
from toolkit.errors import InputError

Writer = Callable[..., Path]


def problems_of(words: list[str], folder: Path) -> str:
    with pytest.raises(InputError) as raised:
        find_runs(words, folder)
    return str(raised.value)


def test_a_run_is_found_by_path_and_by_name(tmp_path: Path, facts_writer: Writer) -> None:
    casual, polite = facts_writer(tmp_path / "runs" / "casual", "h1"), facts_writer(tmp_path / "far" / "polite", "h1")
    found = find_runs(["casual", str(polite)], tmp_path / "runs")
    assert [run.path for run in found] == [casual.resolve(), polite.resolve()]


def test_a_trailing_slash_names_the_same_run(tmp_path: Path, facts_writer: Writer) -> None:
    casual = facts_writer(tmp_path / "casual", "h1")
    assert find_runs([f"{casual}/"], tmp_path)[0].name == "casual"


def test_a_missing_run_is_answered_with_those_there_are(tmp_path: Path, facts_writer: Writer) -> None:
    facts_writer(tmp_path / "casual", "h1")
    assert "casual" in problems_of(["missing"], tmp_path)
    assert "train one first" in problems_of(["missing"], tmp_path / "none")


def test_another_base_is_refused_with_the_command_that_serves_it(tmp_path: Path, facts_writer: Writer) -> None:
    facts_writer(tmp_path / "casual", "h1"), facts_writer(tmp_path / "other", "h2")
    assert f"python -m serve {(tmp_path / 'other').resolve()} --port 8001" in problems_of(["casual", "other"], tmp_path)


def test_a_run_whose_every_weight_was_trained_is_served_alone(tmp_path: Path, facts_writer: Writer) -> None:
    facts_writer(tmp_path / "casual", "h1"), facts_writer(tmp_path / "whole", "h1")
    (tmp_path / "whole" / WHOLE_MODEL).mkdir()
    assert "by itself" in problems_of(["casual", "whole"], tmp_path)
    assert "by itself" in problems_of(["whole", "casual"], tmp_path)
    assert find_runs(["whole"], tmp_path)[0].name == "whole"


def test_two_runs_of_one_name_are_refused(tmp_path: Path, facts_writer: Writer) -> None:
    one, other = facts_writer(tmp_path / "a" / "casual", "h1"), facts_writer(tmp_path / "b" / "casual", "h1")
    assert "Rename" in problems_of([str(one), str(other)], tmp_path)


def test_all_problems_come_at_once(tmp_path: Path, facts_writer: Writer) -> None:
    facts_writer(tmp_path / "base", "h1")
    text = problems_of(["base", "missing"], tmp_path)
    assert "2 problems" in text and "Rename" in text and "missing" in text


def test_a_damaged_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text("{", encoding="utf-8")
    assert "cannot be read" in problems_of(["torn"], tmp_path)


def test_the_folder_of_a_whole_model_is_the_one_the_toolkit_writes() -> None:
    from toolkit import loaded

    assert loaded.WHOLE_MODEL == WHOLE_MODEL


def test_a_run_that_is_still_trained_is_refused(tmp_path: Path, facts_writer: Writer) -> None:
    facts_writer(tmp_path / "young", "h1", status="training")
    assert "not finished" in problems_of(["young"], tmp_path)
