"""What a recipe may say of several bases, and what refuses it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.errors import RecipeError
from toolkit.recipe.model import Base, Candidates
from toolkit.recipe.read import read_recipe
from toolkit.recipe.show import to_yaml
from toolkit.train import main as train

Problems = Callable[..., list[str]]
DATA = "data: {train: ['maltu:probes.jsonl']}\n"
HEAD = f"name: mine\nbase: {{candidates: [spoken-mini, ./없음]}}\n{DATA}"


def written(folder: Path, text: str = HEAD) -> Path:
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    return folder / "r.yaml"


def test_candidates_have_their_defaults(tmp_path: Path) -> None:
    base = read_recipe(written(tmp_path), to_choose=True).base
    assert base == Candidates(candidates=("spoken-mini", "./없음"), minutes_each=3.0)


def test_a_folder_that_is_not_there_is_no_mistake_of_the_recipe(tmp_path: Path) -> None:
    read_recipe(written(tmp_path), to_choose=True)


def test_a_run_refuses_several_bases_with_the_command_that_chooses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path)
    assert train([str(file)]) == 2
    said = capsys.readouterr().err
    assert "line 2  base.candidates: several bases to choose from, and a run trains on one." in said
    assert f"python -m toolkit choose {file}" in said


def test_one_base_named_on_the_command_line_takes_the_place_of_all(tmp_path: Path) -> None:
    base = read_recipe(written(tmp_path), ["base.model=spoken-mini"]).base
    assert base == Base(model="spoken-mini")


def test_candidates_on_the_command_line_take_the_place_of_one(tmp_path: Path) -> None:
    file = written(tmp_path, f"name: mine\nbase: {{model: spoken-mini, quantize: none}}\n{DATA}")
    assert isinstance(read_recipe(file, ["base.candidates=[spoken-mini]"], to_choose=True).base, Candidates)


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("{candidates: []}", "base.candidates: is an empty list. Name at least one"),
        ("{candidates: [a, b, a]}", "base.candidates: a: named twice. Name each base once"),
        ("{candidates: a}", "base.candidates: must be a list, as in [a], not 'a'"),
        ("{candidates: [a], minutes_each: 0}", "base.minutes_each: must be more than 0, not 0"),
        (
            "{candidates: [a], minute_each: 3}",
            "base.minute_each: not a key of bases to choose from. Did you mean 'minutes_each'?",
        ),
        ("{candidates: [a], revision: main}", "is a key of an existing base, not of bases to choose from. Remove it"),
        ("{candidates: [a], model: b}", "a base is named (model), made (new) or chosen from several (candidates)"),
        (
            "{new: {vocab: 300}, candidates: [b]}",
            "a base is named (model), made (new) or chosen from several (candidates)",
        ),
    ],
)
def test_what_is_wrong_with_several_bases_is_told_once(problems: Problems, base: str, says: str) -> None:
    more = "adapter: {kind: full}\n" if "new" in base else ""
    found = problems(more, head=f"name: mine\nbase: {base}\n{DATA}")
    assert any(says in one for one in found), found
    assert len([one for one in found if "several bases to choose from" not in one]) == 1, found


def test_a_recipe_of_several_bases_is_written_and_read_again(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path), to_choose=True)
    assert read_recipe(written(tmp_path, to_yaml(recipe)), to_choose=True) == recipe


@pytest.mark.parametrize(
    ("track", "says"),
    [
        ("[wandb, {wandb: {artifact: true}}]", "track: wandb: named twice. Name each tracker once"),
        (
            "[{wandb: {artefact: true}}]",
            "wandb.artefact: not a key of wandb's options. Did you mean 'artifact'?",
        ),
        ("[{trackio: {}}]", "track.0.trackio"),
        ("[wnadb]", "track.0: must be tensorboard, wandb or trackio, not 'wnadb'. Did you mean 'wandb'?"),
    ],
)
def test_what_is_wrong_with_trackers_is_told(problems: Problems, track: str, says: str) -> None:
    found = problems(f"track: {track}\n")
    assert any(says in one for one in found), found


def test_a_tracker_may_have_options(tmp_path: Path) -> None:
    text = f"name: mine\nbase: {{model: spoken-mini}}\n{DATA}track: [tensorboard, {{wandb: {{artifact: true}}}}]\n"
    recipe = read_recipe(written(tmp_path, text), to_run=False)
    assert recipe.track[0] == "tensorboard" and not isinstance(recipe.track[1], str)
    assert recipe.track[1].wandb.artifact and recipe.track[1].wandb.project == "maltu"
    assert read_recipe(written(tmp_path, to_yaml(recipe)), to_run=False) == recipe


def test_choosing_from_one_base_is_refused(tmp_path: Path) -> None:
    from toolkit.__main__ import main as maltu

    file = written(tmp_path, f"name: mine\nbase: {{model: spoken-mini}}\n{DATA}")
    assert maltu(["choose", str(file)]) == 2
    with pytest.raises(RecipeError):
        read_recipe(written(tmp_path))
