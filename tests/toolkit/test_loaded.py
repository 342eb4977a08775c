"""A run opened for use: the base it stands on, with and without what was taught."""

from pathlib import Path

import pytest
import torch

from toolkit.errors import RunError
from toolkit.loaded import load_run
from toolkit.train import main

pytestmark = pytest.mark.slow
QUICK = ("train.max_steps=2", "data.valid=0", "data.test=0", "--quiet")


def train(recipe: Path, *more: str) -> Path:
    runs = recipe.parent / "runs"
    assert main([str(recipe), *more, *QUICK, "--runs", str(runs)]) == 0
    return runs / "tiny"


def test_the_bare_base_of_a_full_run_is_its_base_and_not_the_run(recipe_file: Path) -> None:
    run = train(recipe_file, "adapter={kind: full}")
    whole, bare = load_run(run, "cpu"), load_run(run, "cpu", with_adapter=False)
    weights, others = whole.base.model.get_input_embeddings().weight, bare.base.model.get_input_embeddings().weight
    assert bare.base.hash == whole.facts["base"]["hash"]
    assert not torch.equal(weights, others)


def test_a_run_from_scratch_has_no_bare_base(recipe_file: Path) -> None:
    new = "base={new: {hidden: 32, layers: 1, heads: 1, vocab: 300, context: 64}}"
    run = train(recipe_file, new, "adapter={kind: full}", "train.optimizer=muon")
    assert load_run(run, "cpu").model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 300)
    with pytest.raises(RunError, match="made from scratch"):
        load_run(run, "cpu", with_adapter=False)


def test_a_relative_base_is_found_where_it_lay(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from toolkit.shipped import shipped

    home, elsewhere = recipe_file.parent, recipe_file.parent / "elsewhere"
    shutil.copytree(shipped("base/spoken-mini"), home / "mine")
    (elsewhere / "mine").mkdir(parents=True)  # another folder of that name, where the run is used
    monkeypatch.chdir(home)
    run = train(recipe_file, "base={model: ./mine}")
    monkeypatch.chdir(elsewhere)
    opened = load_run(run, "cpu").base
    assert opened.folder == home / "mine" and opened.source == "./mine"


@pytest.mark.parametrize(
    ("override", "says"),
    [("train.max_length=5000", "more than the 512 tokens"), ("train.keep=[9]", "step 9 never comes")],
)
def test_what_the_base_or_the_run_cannot_give_is_told(
    recipe_file: Path, override: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe_file), override, *QUICK, "--runs", str(recipe_file.parent / "runs")]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_left_as_it_is(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = recipe_file.parent / "runs" / "tiny"
    mine.mkdir(parents=True)
    (mine / "README.md").write_text("내 글")
    assert main([str(recipe_file), *QUICK, "--runs", str(mine.parent)]) == 2
    assert "is no run (README.md)" in capsys.readouterr().err
    assert [p.name for p in mine.iterdir()] == ["README.md"] and (mine / "README.md").read_text() == "내 글"
