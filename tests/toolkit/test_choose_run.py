"""A choice from its recipe to its leaderboard, with results that were never measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.choosing_world import Handing, some_result, write_recipe
from tests.searching_world import write_base
from toolkit.choose.about import Filters
from toolkit.choose.command import size_of
from toolkit.choose.run import Options, run
from toolkit.errors import BaseError, DataError, InputError, RecipeError, RunError
from toolkit.fit.plan import Place
from toolkit.recipe.read import read_recipe

Out = Callable[[], str]


@pytest.fixture
def here(tmp_path: Path, talk_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with talk.jsonl and two tiny bases, ./하나 and ./둘."""
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "하나")
    write_base(tmp_path / "둘")
    return tmp_path


def choose(
    folder: Path,
    results: dict[str, Any],
    *overrides: str,
    filters: Filters | None = None,
    table: Path | None = None,
    code: int = 0,
    **keys: Any,
) -> Handing:
    """Choose among the bases of these results; what the runner was asked."""
    runner = Handing(results)
    recipe = read_recipe(write_recipe(folder, list(results), **keys), overrides, to_choose=True)
    options = Options(Path("runs"), filters or Filters(), table, command="pick.yaml")
    assert run(recipe, options, runner) == code
    return runner


def board(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs/말투-choose/leaderboard.json").read_text(encoding="utf-8"))
    return found


def page(folder: Path) -> str:
    return (folder / "runs/말투-choose/leaderboard.md").read_text(encoding="utf-8")


TWO = {"./하나": some_result("./하나", 2.0), "./둘": some_result("./둘", 1.5)}


def test_the_best_wins_and_its_command_trains_on_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choose(here, TWO)
    found = board(here)
    assert found["winner"] == "./둘" and [row["model"] for row in found["leaderboard"]] == ["./둘", "./하나"]
    command = "python -m toolkit.train pick.yaml base.model=./둘"
    assert found["train_with"].replace("'", "") == command
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.replace("'", "") == command
    assert read_recipe(here / "pick.yaml", ["base.model=./둘"]).base.model == "./둘"  # type: ignore[union-attr]


def test_the_page_says_what_was_measured(here: Path) -> None:
    choose(here, TWO)
    text = page(here)
    assert "./둘 is best: 0.500 (0.500 to 0.500) bits per byte below ./하나." in text
    for word in ("| 1 | ./둘 | 1.", "gain / min", "first token ms", "+0.10 → +0.40", "not known", "chrf"):
        assert word in text, word


def test_no_clear_winner_is_said(here: Path) -> None:
    close = {name: some_result(name, mean, own=0.5) for name, mean in (("./하나", 2.0), ("./둘", 1.99))}
    choose(here, close)
    assert board(here)["winner"] is None and len(board(here)["leaders"]) == 2
    assert "No clear winner" in page(here)


def test_a_candidate_that_fails_is_named_and_the_others_go_on(here: Path) -> None:
    choose(here, {**TWO, "./없음": some_result("./없음", 1.0), "./둘": "its weights are pickled"})
    found = board(here)
    assert [row["model"] for row in found["leaderboard"]] == ["./하나"]
    why = {left["model"]: left["why"] for left in found["left_out"]}
    assert "there is no such folder" in why["./없음"] and why["./둘"] == "its weights are pickled"
    assert "./하나 is the only one that could be compared." in page(here)


def test_where_nobody_can_be_compared_the_exit_code_says_so(here: Path) -> None:
    choose(here, {"./하나": "out of memory"}, code=1)
    assert board(here)["train_with"] == ""


def test_after_a_kill_only_what_was_not_measured_is_tried(here: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        choose(here, {**TWO, "./둘": KeyboardInterrupt()})
    again = choose(here, TWO)
    assert [model for model, _ in again.asked] == ["./둘"]
    assert any("1 results are of an earlier call" in note for note in board(here)["notes"])


@pytest.mark.parametrize("change", ["talk", "base", "recipe", "minutes"])
def test_what_a_result_depends_on_makes_it_new(here: Path, change: str) -> None:
    choose(here, TWO)
    keys: dict[str, Any] = {"minutes_each": 2.0} if change == "minutes" else {}
    if change == "talk":
        with (here / "talk.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"messages": [{"role": "user", "content": "새로"}, {"role": "assistant", "content": "응!"}]}\n')
    if change == "base":
        config = json.loads((here / "둘/config.json").read_text())
        (here / "둘/config.json").write_text(json.dumps({**config, "note": "changed"}))
    overrides = ["adapter.rank=4"] if change == "recipe" else []
    again = choose(here, TWO, *overrides, **keys)
    assert [model for model, _ in again.asked] == (["./둘"] if change == "base" else ["./하나", "./둘"])


def test_one_more_candidate_costs_one_more_result(here: Path) -> None:
    choose(here, {"./하나": TWO["./하나"]})
    assert [model for model, _ in choose(here, TWO).asked] == ["./둘"]


def test_a_damaged_result_is_measured_again(here: Path) -> None:
    choose(here, TWO)
    for file in (here / "runs/말투-choose/candidates").glob("*.json"):
        file.write_text('{"key": ')
    assert len(choose(here, TWO).asked) == 2


def test_many_candidates_are_halved(here: Path) -> None:
    names = [f"./m{number}" for number in range(8)]
    for name in names:
        write_base(here / name)
    runner = choose(here, {name: some_result(name, 1.0 + 0.1 * at) for at, name in enumerate(names)})
    assert [minutes for _, minutes in runner.asked] == [0.75] * 8 + [3.0] * 2
    found = board(here)
    assert [row["model"] for row in found["leaderboard"]] == ["./m0", "./m1"]
    assert [row["model"] for row in found["beaten_in_a_briefer_round"]] == names[2:]
    assert [row["rank"] for row in found["beaten_in_a_briefer_round"]] == [3, 4, 5, 6, 7, 8]


def test_filters_leave_out_before_anything_is_tried(here: Path) -> None:
    results = {**TWO, "spoken-mini": some_result("spoken-mini", 3.0), "exaone-4.0-1.2b": "never tried"}
    filters = Filters(("commercial",), ("ko",), 10_000_000)
    runner = choose(here, results, filters=filters)
    assert [model for model, _ in runner.asked] == ["spoken-mini"]
    why = {left["model"]: left["why"] for left in board(here)["left_out"]}
    assert why["./하나"].startswith("licence not known, asked: commercial")
    assert "weights 1,200,000,000, asked: at most 10,000,000" in why["exaone-4.0-1.2b"]


def test_the_weights_of_a_folder_are_counted(here: Path) -> None:
    runner = choose(here, TWO, filters=Filters(max_parameters=1_000_000))
    assert len(runner.asked) == 2
    with pytest.raises(BaseError, match=r"\./하나: weights 28\d,\d\d\d, asked: at most 100,000"):
        choose(here, TWO, filters=Filters(max_parameters=100_000))


def test_a_base_that_memory_does_not_hold_is_left_out(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.choose.run.place_here", lambda: Place("cpu", 1, 1_000_000))
    with pytest.raises(BaseError, match=r"\./하나: needs about 0\.0 GB of memory and 0\.0 GB are free on cpu"):
        choose(here, TWO)


def test_figures_of_others_stand_beside_and_change_nothing(here: Path) -> None:
    (here / "klue.csv").write_text("model,benchmark,score,source\n./하나,KLUE-YNAT,99.5,그들\n", encoding="utf-8")
    choose(here, TWO, table=here / "klue.csv")
    text = page(here)
    assert "Figures of others, from" in text and "Not measured here" in text and "그들" in text
    assert "| ./하나 | 99.5 |" in text and "| ./둘 | – |" in text
    assert board(here)["winner"] == "./둘"


def test_a_table_that_is_none_is_told_before_anything_is_tried(here: Path) -> None:
    (here / "klue.csv").write_text("model,f1\na,1\n", encoding="utf-8")
    with pytest.raises(DataError, match="columns are missing: benchmark, score"):
        choose(here, TWO, table=here / "klue.csv")
    assert not (here / "runs").exists()


def test_one_held_out_conversation_gives_no_interval_and_says_so(here: Path) -> None:
    choose(here, {name: some_result(name, mean, n_talks=1) for name, mean in (("./하나", 2.0), ("./둘", 1.5))})
    assert board(here)["leaderboard"][0]["interval"] is None and board(here)["winner"] is None
    assert "One held-out conversation: there is no interval" in page(here)
    assert "No clear winner" in page(here)


def test_no_spoken_pairs_is_said(here: Path) -> None:
    choose(here, {"./하나": some_result("./하나", 2.0, spoken={})})
    assert "How spoken they are was not measured" in page(here)


def test_nothing_held_out_is_refused(here: Path) -> None:
    with pytest.raises(RecipeError, match="nothing is held out"):
        choose(here, TWO, "data.valid=0", "data.test=0")


def test_the_folder_of_a_run_is_not_written_into(here: Path) -> None:
    (here / "runs/말투-choose").mkdir(parents=True)
    (here / "runs/말투-choose/run.json").write_text("{}")
    with pytest.raises(RunError, match="is a run"):
        choose(here, TWO)


@pytest.mark.parametrize(
    ("text", "number"), [("600m", 600_000_000), ("1.5B", 1_500_000_000), ("260k", 260_000), ("7", 7)]
)
def test_sizes_are_written_as_people_write_them(text: str, number: int) -> None:
    assert size_of(text) == number


@pytest.mark.parametrize("text", ["", "big", "-3b", "3t", "1,5b"])
def test_a_size_that_is_none_is_told(text: str) -> None:
    with pytest.raises(InputError, match="is no number of weights"):
        size_of(text)
