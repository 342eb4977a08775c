"""A study in its journal: what is asked, told and remembered, by one worker and by several in turns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers import QMCSampler
from optuna.trial import TrialState

from tests.search_world import (
    GRID,
    N_EVALUATIONS,
    RESOLVED,
    SPACE,
    Time,
    Told,
    identity_of,
    loss_of,
    make_recipe,
    open_study,
    try_one,
    work,
)
from toolkit.errors import RecipeError, RunError
from toolkit.search import study as study_module
from toolkit.search.storage import JOURNAL
from toolkit.search.study import Asked, Study


def test_the_recipes_own_values_come_first(tmp_path: Path) -> None:
    asked = open_study(make_recipe(tmp_path), tmp_path / "search").ask()
    assert asked is not None
    assert asked.params == {"train.learning_rate": 0.003, "train.batch_size": 8}
    assert asked.recipe.train.learning_rate == 0.003
    assert asked.recipe.search is None


def test_own_values_that_are_not_in_the_space_are_not_asked(tmp_path: Path) -> None:
    study = open_study(make_recipe(tmp_path), tmp_path / "search", resolved={})
    study.ask()
    assert "own" not in study.trials()[0].user_attrs


def test_a_grid_has_every_point_once_and_its_own_values_first(tmp_path: Path) -> None:
    space = "{train.epochs: {low: 1.0, high: 3.0, step: 0.5}, train.batch_size: [4, 8]}"
    study = open_study(make_recipe(tmp_path, space=space, sampler="grid", trials=100), tmp_path / "search")
    assert study.budget == 10
    assert len(work(study)) == 10
    points = [(trial.params["train.epochs"], trial.params["train.batch_size"]) for trial in study.trials()]
    assert points[0] == (3.0, 8)
    assert len(set(points)) == 10
    assert study.is_over()


def test_two_workers_share_a_grid_without_a_point_twice(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, space=GRID, sampler="grid", trials=12)
    a, b = (open_study(recipe, tmp_path / "search") for _ in range(2))
    asked = [one for _ in range(8) for one in (a.ask(), b.ask()) if one is not None]
    assert len({json.dumps(one.params, sort_keys=True) for one in asked}) == 12 == len(asked)


def both_at_once(late: Study, quick: Study, monkeypatch: pytest.MonkeyPatch) -> list[Asked | None]:
    """What two workers are given when the quick one looks and asks between the late one's look and its claim."""
    real, given = late._make, []

    def make(*wanted: Any) -> int:
        if not given:
            given.append(quick.ask())
        return real(*wanted)

    monkeypatch.setattr(late, "_make", make)
    return [late.ask(), *given]


def void(study: Study) -> list[int]:
    """Numbers of the trials that were never tried, because another one had their place."""
    return [trial.number for trial in study.optuna.trials if trial.user_attrs.get("reason") == "twice"]


def test_the_last_place_of_the_budget_goes_to_the_lower_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path, trials=2)
    a, b = (open_study(recipe, tmp_path / "search") for _ in range(2))
    a.ask()
    late, quick = both_at_once(a, b, monkeypatch)
    assert late is None
    assert quick is not None and quick.number == 1
    assert void(a) == [2]
    assert [trial.number for trial in a.trials()] == [0, 1]


def test_the_recipes_own_values_go_to_the_lower_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path, trials=5)
    a, b = (open_study(recipe, tmp_path / "search") for _ in range(2))
    late, quick = both_at_once(a, b, monkeypatch)
    assert late is not None and quick is not None
    assert (quick.number, void(a), late.number) == (0, [1], 2)
    assert [trial.user_attrs.get("own") for trial in a.trials()] == [True, None]


def test_a_lost_trial_is_asked_again_by_the_lower_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path, trials=2)
    gone, a, b = (open_study(recipe, tmp_path / "search") for _ in range(3))
    gone.ask()
    gone.leave()
    late, quick = both_at_once(a, b, monkeypatch)
    assert late is not None and quick is not None
    assert (quick.number, quick.again_of, void(a)) == (1, 0, [2])
    assert (late.number, late.again_of) == (3, None)


def test_a_point_of_the_grid_goes_to_the_lower_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path, space=GRID, sampler="grid", trials=12)
    a, b = (open_study(recipe, tmp_path / "search") for _ in range(2))
    late, quick = both_at_once(a, b, monkeypatch)
    assert late is not None and quick is not None
    assert (quick.number, void(a), late.number) == (0, [1], 2)
    assert late.params != quick.params


def test_a_point_of_the_qmc_sequence_goes_to_the_lower_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(make_recipe(tmp_path, sampler="qmc", trials=4, pruner="none"), tmp_path / "search")
    try_one(study, study.ask())
    ids = iter((0, 0, 1))  # two workers read the counter before either wrote it
    monkeypatch.setattr(QMCSampler, "_find_sample_id", lambda *_: next(ids))
    first, second = study.ask(), study.ask()
    assert first is not None and second is not None
    assert (first.number, void(study), second.number) == (1, [2], 3)
    assert first.params != second.params


def test_what_is_told_is_kept(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, pruner="none", trials=4)
    study = open_study(recipe, tmp_path / "search")
    for _ in range(3):
        study.ask()
    for step, loss in ((1, 2.5), (2, float("nan")), (3, 2.25)):
        study.report(0, step, loss)
        study.report(1, step, 3.0)
    study.finish(0, 2.25, {"steps": 30, "seconds": 1.5, "kind": "lora", "best_step": None})
    study.prune(1, {"steps": 10})
    study.fail(2, "no memory", {"steps": 0})
    finished, pruned, failed = open_study(recipe, tmp_path / "search").trials()
    assert (finished.value, finished.state) == (2.25, TrialState.COMPLETE)
    assert list(finished.intermediate_values) == [1, 2, 3]
    assert {name: finished.user_attrs[name] for name in ("steps", "seconds", "kind", "best_step")} == {
        "steps": 30, "seconds": 1.5, "kind": "lora", "best_step": None,
    }  # fmt: skip
    assert (pruned.state, pruned.value, pruned.user_attrs["steps"]) == (TrialState.PRUNED, 3.0, 10)
    assert (failed.state, failed.user_attrs["reason"]) == (TrialState.FAIL, "no memory")


@pytest.mark.parametrize("loss", (float("nan"), float("inf")))
def test_a_loss_that_is_not_finite_is_a_failure_that_counts(tmp_path: Path, loss: float) -> None:
    study = open_study(make_recipe(tmp_path, trials=1), tmp_path / "search")
    study.ask()
    study.finish(0, loss, {})
    assert study.best() is None
    assert study.trials()[0].user_attrs["reason"] == f"its loss is {loss}"
    assert study.ask() is None
    assert study.is_over()


def test_best_is_the_lowest_loss_of_those_trained_to_the_end(tmp_path: Path) -> None:
    study = open_study(make_recipe(tmp_path), tmp_path / "search")
    for number, loss in enumerate((2.0, 1.0, 1.0)):
        study.ask()
        study.finish(number, loss, {})
    study.ask()
    study.report(3, 1, 0.1)
    study.prune(3, {})
    best = study.best()
    assert best is not None and best.number == 1


def test_values_that_do_not_go_together_fail_and_the_next_trial_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(make_recipe(tmp_path, trials=2), tmp_path / "search")
    real: Callable[..., Any] = study_module.suggest

    def refuse_the_first(trial: Any, recipe: Any) -> Any:
        made = real(trial, recipe)
        if trial.number == 0:
            raise RecipeError("말투", [])
        return made

    monkeypatch.setattr(study_module, "suggest", refuse_the_first)
    asked = study.ask()
    assert asked is not None and asked.number == 1
    assert study.trials()[0].state == TrialState.FAIL
    assert study.ask() is None


def test_the_minutes_end_it_and_a_pause_between_two_starts_is_not_in_them(tmp_path: Path) -> None:
    time = Time()
    recipe = make_recipe(tmp_path, minutes=10, trials=50)
    first = open_study(recipe, tmp_path / "search", clock=time.clock())
    time.t += 240
    first.ask()
    first.finish(0, 1.0, {})
    first.leave()
    time.t += 100_000
    second = open_study(recipe, tmp_path / "search", clock=time.clock())
    assert second.seconds_left() == pytest.approx(360)
    assert second.ask() is not None
    time.t += 361
    assert second.ask() is None
    assert not second.is_over()
    second.finish(1, 1.0, {})
    assert second.is_over()


def test_two_workers_at_once_use_the_minutes_once(tmp_path: Path) -> None:
    time = Time()
    recipe = make_recipe(tmp_path, minutes=10)
    a, b = (open_study(recipe, tmp_path / "search", clock=time.clock()) for _ in range(2))
    time.t += 60
    a.beat(), b.beat()
    assert a.seconds_left() == b.seconds_left() == pytest.approx(540)


def test_patience_ends_it_when_nothing_gets_better(tmp_path: Path) -> None:
    study = open_study(make_recipe(tmp_path, patience=3, trials=50), tmp_path / "search")
    for number, loss in enumerate((2.0, 1.0, 1.5)):
        study.ask()
        study.finish(number, loss, {})
    study.ask(), study.ask()
    study.prune(3, {})
    assert not study.is_over()
    study.fail(4, "no memory", {})
    assert study.ask() is None
    assert study.is_over()


def test_patience_waits_for_a_first_result(tmp_path: Path) -> None:
    study = open_study(make_recipe(tmp_path, patience=1), tmp_path / "search")
    study.ask(), study.ask(), study.ask()
    study.prune(0, {})
    study.fail(1, "no memory", {})
    assert study.ask() is not None
    study.finish(2, 1.0, {})
    assert study.ask() is not None
    study.prune(3, {})
    assert study.ask() is None


def test_a_larger_budget_goes_on_with_the_same_study(tmp_path: Path) -> None:
    work(open_study(make_recipe(tmp_path, trials=3), tmp_path / "search"))
    study = open_study(make_recipe(tmp_path, trials=5, patience=20, minutes=5, workers=2), tmp_path / "search")
    assert not study.is_over()
    assert work(study) == [3, 4]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sampler": "random"}, "search.sampler: tpe became random"),
        ({"space": SPACE.replace("5.0e-3", "6.0e-3")}, "search.space.train.learning_rate.high: 0.005 became 0.006"),
    ],
)
def test_a_changed_recipe_is_refused_with_what_changed(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    open_study(make_recipe(tmp_path), tmp_path / "search")
    with pytest.raises(RunError) as caught:
        open_study(make_recipe(tmp_path, **change), tmp_path / "search")
    assert told in str(caught.value)
    assert "name=말투-2" in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert caught.value.exit_code == 2


def test_changed_data_and_base_are_refused(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    open_study(recipe, tmp_path / "search")
    with pytest.raises(RunError, match="probes: the file changed\n  base: its files changed"):
        open_study(recipe, tmp_path / "search", identity=identity_of(recipe, data="d2", base="b2"))


def test_trials_that_were_made_and_never_given_out_do_not_use_up_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(make_recipe(tmp_path, trials=2), tmp_path / "search")
    with monkeypatch.context() as broken:
        broken.setattr(study, "_propose", lambda number: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            study.ask()
    assert [asked.number for _ in range(3) if (asked := study.ask()) is not None] == [1, 2]
    assert study.trials()[0].user_attrs["own"] is True


def test_the_losses_fall_so_that_a_finished_trial_is_better_than_its_first_report() -> None:
    assert loss_of(RESOLVED, N_EVALUATIONS) < loss_of(RESOLVED, 1)


def test_the_journal_lies_in_the_folder_and_optuna_opens_it(tmp_path: Path) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    work(open_study(make_recipe(tmp_path, trials=3), tmp_path / "search"))
    file = tmp_path / "search" / JOURNAL
    opened = optuna.load_study(study_name="말투", storage=JournalStorage(JournalFileBackend(str(file))))
    assert len(opened.trials) == 3


def test_a_study_says_nothing_of_its_own_accord(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    say = Told()
    work(open_study(make_recipe(tmp_path, trials=4), tmp_path / "search", say=say))
    assert say.lines == []
    assert capfd.readouterr() == ("", "")


def test_a_recipe_without_search_has_no_study(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    (tmp_path / "search").mkdir()
    with pytest.raises(ValueError, match="search section"):
        Study.open(
            recipe.model_copy(update={"search": None}),
            tmp_path / "search",
            worker=open_study(recipe, tmp_path / "other").worker,
            identity=identity_of(recipe),
            resolved=RESOLVED,
            say=Told(),
        )
