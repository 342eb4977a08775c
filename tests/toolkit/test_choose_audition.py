"""One candidate for real, on a tiny base: what it learns, what is measured, and what ends it."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.choosing_world import write_recipe
from tests.encoder_world import save_encoder, texts
from tests.searching_world import write_base
from toolkit.__main__ import main as maltu
from toolkit.bases.load import load_base
from toolkit.choose.audition import audition
from toolkit.choose.crew import Crew
from toolkit.choose.job import Job, recipe_of
from toolkit.choose.lesson import FACTORS, learn
from toolkit.choose.result import Result, read_result
from toolkit.choose.run import apart
from toolkit.errors import BaseError, TrainingError
from toolkit.fit.cached import CachedRows
from toolkit.fit.inputs import inputs_of
from toolkit.recipe.model import Base, Recipe
from toolkit.recipe.read import read_recipe

pytestmark = pytest.mark.slow
FEW = "train: {max_steps: 6, batch_size: 8, learning_rate: 0.03}\nadapter: {kind: lora, rank: 4}\n"


@pytest.fixture
def here(tmp_path: Path, talk_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    return tmp_path


def recipe_in(folder: Path, more: str = FEW) -> Recipe:
    return read_recipe(write_recipe(folder, ["./base"], more), to_choose=True)


def job_of(folder: Path, recipe: Recipe, minutes: float = 5.0) -> Job:
    return Job(
        str(folder / "pick.yaml"), "./base", minutes, "열쇠", inputs_of(recipe)["data"], str(folder / "out/base.json")
    )


@pytest.fixture
def measured(here: Path) -> Result:
    recipe = recipe_in(here)
    return audition(recipe, job_of(here, recipe))


def test_three_rates_learn_and_the_best_is_measured(measured: Result) -> None:
    assert [round(one["learning_rate"], 4) for one in measured.rates] == [round(0.03 * factor, 4) for factor in FACTORS]
    assert [one["steps"] for one in measured.rates] == [6, 6, 6]
    losses = {one["learning_rate"]: one["loss"] for one in measured.rates}
    assert measured.learning_rate == min(losses, key=losses.__getitem__)
    after, before = (sum(talk[at] for talk in measured.talks.values()) for at in (0, 1))
    assert after < before


def test_bits_are_over_the_bytes_of_what_is_said(here: Path, measured: Result) -> None:
    counts = sorted(count for _, _, count in measured.talks.values())
    rows = [json.loads(line)["messages"] for line in (here / "talk.jsonl").read_text(encoding="utf-8").splitlines()]
    said = [sum(len(turn["content"].encode()) for turn in row if turn["role"] == "assistant") for row in rows]
    assert counts and all(count in said for count in counts)


def test_everything_a_leaderboard_shows_is_there(measured: Result) -> None:
    assert measured.tokens_per_s and measured.first_token_ms and measured.bytes_per_s and measured.memory_mb > 0
    assert {"before all", "after all"} <= set(measured.spoken)
    assert measured.measure == "bits per byte" and measured.n_unknown == 0


def test_a_result_is_written_and_read_again_under_its_key_alone(measured: Result, tmp_path: Path) -> None:
    measured.write(tmp_path / "r.json")
    assert read_result(tmp_path / "r.json", measured.key) == measured
    assert read_result(tmp_path / "r.json", "another") is None


def test_when_time_is_up_each_rate_has_taken_a_step_and_is_measured(here: Path) -> None:
    recipe = recipe_in(here, FEW.replace("max_steps: 6", "max_steps: 500"))
    found = audition(recipe, job_of(here, recipe, minutes=1e-9))
    assert [(one["steps"], one["best_step"]) for one in found.rates] == [(1, 1)] * 3
    assert found.steps_asked == 500


def test_learning_leaves_the_base_as_it_was(here: Path) -> None:
    recipe = recipe_of(recipe_in(here), "./base")
    assert isinstance(recipe.base, Base)
    base = load_base(recipe.base, "cpu", torch.float32)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    rows = CachedRows(recipe, base, {}).of(recipe)
    learn(recipe, base, rows, 5.0, here / "place", lambda: False)
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_orphan_stops(here: Path) -> None:
    recipe = recipe_in(here)
    with pytest.raises(TrainingError, match="told to stop"):
        audition(recipe, job_of(here, recipe), wants_stop=lambda: True)


def test_labels_are_compared_by_log_loss(here: Path) -> None:
    rows = [
        {"text": f"{'정말 좋아요' if i % 2 else '별로예요'} {i}", "label": "좋음" if i % 2 else "나쁨"}
        for i in range(60)
    ]
    (here / "talk.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    more = FEW + "task: classify\n"
    file = write_recipe(here, ["./base"], more)
    text = file.read_text(encoding="utf-8")
    text = text.replace("[talk.jsonl],", "[talk.jsonl], format: {kind: labels, text: text, label: label},")
    file.write_text(text.replace("clean: {near_duplicates: null}", "clean: {near_duplicates: null, duplicates: none}"))
    recipe = read_recipe(file, to_choose=True)
    found = audition(recipe, job_of(here, recipe))
    assert found.measure == "log loss" and {"accuracy", "macro f1"} <= set(found.numbers)
    assert all(count == 1.0 for _, _, count in found.talks.values())


def test_an_encoder_is_compared_by_the_same_log_loss(here: Path) -> None:
    save_encoder(here / "encoder")
    rows = [{"text": text, "label": label} for text, label in texts()]
    (here / "talk.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    file = write_recipe(here, ["./encoder"], FEW + "task: classify\n")
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("[talk.jsonl],", "[talk.jsonl], format: {kind: labels, text: text, label: label},"))
    recipe = read_recipe(file, to_choose=True)
    found = audition(recipe, replace(job_of(here, recipe), model="./encoder"))
    assert found.measure == "log loss" and [one["steps"] for one in found.rates] == [6, 6, 6]
    assert found.learning_rate in [one["learning_rate"] for one in found.rates]
    assert {"accuracy", "macro f1"} <= set(found.numbers) and found.tokens_per_s is None
    assert all(before == pytest.approx(math.log(3)) for _, before, _ in found.talks.values())
    assert any("its bare head is random" in note for note in found.notes)


def test_talk_in_another_script_is_compared_without_a_spoken_score(here: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Как дела {i}?"},
                {"role": "assistant", "content": f"Хорошо {i * 7}"},
            ]
        }
        for i in range(40)
    ]
    (here / "talk.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    recipe = recipe_in(here)
    found = audition(recipe, job_of(here, recipe))
    assert found.spoken == {} and found.talks


def test_a_base_that_does_not_load_says_why(here: Path) -> None:
    (here / "base/tokenizer.json").write_text("{")
    recipe = recipe_in(here)
    with pytest.raises(BaseError, match="tokenizer"):
        audition(recipe, job_of(here, recipe))


def test_a_process_of_its_own_gives_the_result_or_the_reason(here: Path) -> None:
    recipe = recipe_in(here)
    found = apart(recipe, job_of(here, recipe))
    assert isinstance(found, Result) and found.model == "./base", found
    assert sorted(path.name for path in (here / "out").iterdir()) == ["base.json"]
    shutil.rmtree(here / "out")
    (here / "base/tokenizer.json").write_text("{")
    why = apart(recipe, job_of(here, recipe))
    assert isinstance(why, str) and "its tokenizer cannot be read" in why


def test_the_command_names_what_does_not_load_and_compares_the_rest(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(here / "base", here / "깨진")
    (here / "깨진/tokenizer.json").write_text("{")
    write_recipe(here, ["./깨진", "./base"], FEW)
    assert maltu(["choose", "pick.yaml"]) == 0
    found = json.loads((here / "runs/말투-choose/leaderboard.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in found["leaderboard"]] == ["./base"]
    assert [left["model"] for left in found["left_out"]] == ["./깨진"]
    assert capsys.readouterr().out.strip().splitlines()[-1] == "python -m toolkit.train pick.yaml base.model=./base"


def test_a_process_that_is_killed_takes_nobody_along(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "site").mkdir()
    killing = "import os, sys\nif 'toolkit.choose.audition' in sys.orig_argv:\n    os.kill(os.getpid(), 9)\n"
    (here / "site/sitecustomize.py").write_text(killing)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{here / 'site'}{os.pathsep}{root}")
    recipe = recipe_in(here)
    why = apart(recipe, job_of(here, recipe))
    assert isinstance(why, str) and "killed: often because memory ran out" in why


def test_the_best_of_no_rate_is_none() -> None:
    nothing: Any = ()
    assert Crew(nothing, 0.0, lambda: False).best() is None
