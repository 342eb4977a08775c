"""Trials between a study and a stack: whose adapter stays, which trial fails, what ends the whole search."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.search_world import make_recipe, open_study
from toolkit.errors import AdapterError, DiskError, SearchError
from toolkit.fit.fitted import Fitted
from toolkit.fit.stackable import holds, name_of
from toolkit.recipe.model import Recipe
from toolkit.search.crew import Crew, Ground, facts_of
from toolkit.search.study import Asked, Study
from toolkit.search.table import SearchTable

CHOICES = "{train.learning_rate: [0.001], train.batch_size: [8, 16]}"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """One whose random search tries the same values more than once."""
    return make_recipe(tmp_path, space=CHOICES, sampler="random", trials=6)


@pytest.fixture
def crews(tmp_path: Path, recipe: Recipe) -> Iterator[list[Crew]]:
    """Two workers of one study, which share a run folder."""
    studies = [open_study(recipe, tmp_path / "search") for _ in range(2)]
    nothing: Any = None
    ground = Ground(recipe, nothing, nothing, tmp_path / "search", tmp_path / "checkpoints")
    table = SearchTable(Console(quiet=True), 6, is_quiet=True)
    yield [Crew(ground, study, tmp_path / "place", table, lambda: False) for study in studies]
    for study in studies:
        study.leave()


def ask(crew: Crew) -> Asked:
    asked = crew.study.ask()
    assert asked is not None
    return asked


def end(crew: Crew, asked: Asked, loss: float, stopped: str = "done") -> None:
    fitted = Fitted(stopped, 6, 6, loss, 1.0, 100)
    crew.study.report(asked.number, 1, loss)
    crew.ended(asked, fitted, facts_of(asked, fitted, 6, 10), lambda folder: (folder / "adapter").mkdir())


def lying(crew: Crew) -> list[int]:
    return sorted(int(path.name) for path in (crew.ground.folder / "trials").iterdir())


def test_only_the_best_adapter_stays(crews: list[Crew]) -> None:
    crew = crews[0]
    for loss, kept in ((3.0, 0), (4.0, 0), (2.0, 2), (2.5, 2)):
        end(crew, ask(crew), loss)
        assert lying(crew) == [kept]
    assert (crew.ground.kept(2) / "fitted.json").is_file()


def test_of_equal_losses_the_adapter_of_the_trial_that_is_the_best_is_there(crews: list[Crew]) -> None:
    first, second = ask(crews[0]), ask(crews[1])
    end(crews[1], second, 2.0)
    end(crews[0], first, 2.0)
    best = crews[0].study.best()
    assert best is not None and best.number == first.number
    assert lying(crews[0]) == [first.number]


def test_an_adapter_that_another_worker_is_about_to_tell_of_stays(
    crews: list[Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ask(crews[0]), ask(crews[1])
    finish = Study.finish

    def meanwhile(study: Study, number: int, loss: float, facts: Any) -> None:
        if number == first.number:  # its adapter is written, and it is not told yet
            end(crews[1], second, 2.5)
        finish(study, number, loss, facts)

    monkeypatch.setattr(Study, "finish", meanwhile)
    end(crews[0], first, 2.0)
    assert lying(crews[0]) == [first.number]


def test_a_pruned_trial_and_one_without_a_number_leave_no_adapter(crews: list[Crew]) -> None:
    end(crews[0], ask(crews[0]), 2.0, "pruned")
    end(crews[0], ask(crews[0]), float("inf"))
    assert not (crews[0].ground.folder / "trials").exists()
    assert [trial.state.name for trial in crews[0].study.trials()] == ["PRUNED", "FAIL"]


def test_a_trial_that_does_not_fit_fails_and_the_next_one_is_asked(
    crews: list[Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Crew, asked: Asked) -> None:
        raise AdapterError("adapter: has no such layer")

    monkeypatch.setattr(Crew, "_member", refuse)
    assert crews[0].next() is None
    trials = crews[0].study.trials()
    assert [trial.user_attrs["reason"] for trial in trials] == ["adapter: has no such layer"] * 6


@pytest.mark.parametrize("error", [DiskError("no room"), SearchError("gone")])
def test_what_is_no_fault_of_a_trial_ends_the_search_and_not_the_trial(
    crews: list[Crew], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(self: Crew, asked: Asked) -> None:
        raise error

    monkeypatch.setattr(Crew, "_member", fail)
    with pytest.raises(type(error)):
        crews[0].next()
    assert [trial.state.name for trial in crews[0].study.trials()] == ["RUNNING"]


@pytest.mark.parametrize(
    ("adapter", "name", "is_held"),
    [
        ("{kind: lora, rank: 4}", "lora", True),
        ("{kind: lora, dora: true}", "lora with DoRA", False),
        ("{kind: lora, init: pissa}", "lora with PiSSA", False),
        ("{kind: prefix, projection: true}", "prefix with projection", False),
        ("{kind: reft}", "reft", True),
        ("{kind: ia3}", "ia3", False),
        ("{kind: full}", "full", False),
    ],
)
def test_what_a_stack_holds_and_what_the_rest_is_called(tmp_path: Path, adapter: str, name: str, is_held: bool) -> None:
    recipe = make_recipe(tmp_path, space="{train.batch_size: [4, 8]}", lines=f"adapter: {adapter}")
    assert (name_of(recipe), holds(recipe)) == (name, is_held)
