"""Every sampler and every pruner through a study's own calls: what they propose, what they end, and when."""

import json
from pathlib import Path

import pytest
from optuna.pruners import HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.trial import TrialState

from tests.search_world import GRID, KINDS, SPACE, make_recipe, open_study, try_one, work
from toolkit.search.samplers import evaluations, pruner, seed_of

SAMPLERS = ("tpe", "random", "grid", "gp", "cmaes", "qmc")
PRUNERS = ("successive_halving", "hyperband", "median", "none")
NUMBERS = "{train.learning_rate: {low: 5.0e-5, high: 5.0e-3, log: true}, train.batch_size: {low: 4, high: 16}}"


def space_for(sampler: str) -> str:
    return {"grid": GRID, "cmaes": NUMBERS}.get(sampler, SPACE)


@pytest.mark.slow
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_with_every_pruner_gives_twelve_trials_out(tmp_path: Path, sampler: str, pruner: str) -> None:
    recipe = make_recipe(tmp_path, space=space_for(sampler), sampler=sampler, pruner=pruner, trials=12)
    study = open_study(recipe, tmp_path / "search")
    assert work(study) == list(range(12))
    states = [trial.state for trial in study.trials()]
    assert states.count(TrialState.COMPLETE) + states.count(TrialState.PRUNED) == 12
    assert (TrialState.PRUNED in states) == (pruner != "none")
    assert study.is_over()
    assert study.ask() is None


@pytest.mark.slow
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("sampler", ("tpe", "random"))
def test_a_space_with_kinds_with_every_pruner(tmp_path: Path, sampler: str, pruner: str) -> None:
    recipe = make_recipe(tmp_path, space=KINDS, sampler=sampler, pruner=pruner, trials=12)
    study = open_study(recipe, tmp_path / "search")
    assert len(work(study)) == 12
    for trial in study.trials():
        kind = trial.params["adapter.kind"]
        assert all(name.startswith(("adapter.", "train.", f"{kind}/")) for name in trial.params)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_dimension_is_enough(tmp_path: Path, sampler: str) -> None:
    space = "{train.warmup_ratio: {low: 0.0, high: 0.3, step: 0.1}}"
    study = open_study(make_recipe(tmp_path, space=space, sampler=sampler, trials=4), tmp_path / "search")
    assert len(work(study)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ("tpe", "gp", "random", "qmc", "cmaes"))
def test_one_seed_gives_the_same_trials_on_a_fresh_study(tmp_path: Path, sampler: str) -> None:
    recipe = make_recipe(tmp_path, space=space_for(sampler), sampler=sampler, trials=9)
    values = []
    for name in ("a", "b"):
        study = open_study(recipe, tmp_path / name)
        work(study)
        values.append([(trial.params, trial.value) for trial in study.trials()])
    assert values[0] == values[1]


def test_another_seed_gives_other_trials(tmp_path: Path) -> None:
    values = []
    for seed in (0, 1):
        recipe = make_recipe(tmp_path, sampler="random", trials=4)
        other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})
        study = open_study(other, tmp_path / str(seed))
        work(study)
        values.append([trial.params for trial in study.trials()[1:]])
    assert all(one not in values[1] for one in values[0])


@pytest.mark.parametrize("sampler", ("tpe", "random", "qmc"))
def test_a_restart_goes_on_where_it_was_and_repeats_nothing(tmp_path: Path, sampler: str) -> None:
    recipe = make_recipe(tmp_path, sampler=sampler, trials=8)
    whole = open_study(recipe, tmp_path / "whole")
    work(whole)
    for _ in range(4):  # two trials by each process
        study = open_study(recipe, tmp_path / "pieces")
        for _ in range(2):
            try_one(study, study.ask())
        study.leave()
    params = [trial.params for trial in open_study(recipe, tmp_path / "pieces").trials()]
    assert params == [trial.params for trial in whole.trials()]
    assert len({json.dumps(one) for one in params}) == 8


def test_a_nan_is_pruned(tmp_path: Path) -> None:
    study = open_study(make_recipe(tmp_path), tmp_path / "search")
    study.ask()
    study.report(0, 1, float("nan"))
    assert study.should_prune(0)


def test_a_pruner_that_is_asked_twice_says_the_same(tmp_path: Path) -> None:
    study = open_study(make_recipe(tmp_path), tmp_path / "search")
    for number, loss in ((0, 1.0), (1, 2.0)):
        study.ask()
        study.report(number, 1, loss)
    assert not study.should_prune(0)
    assert [study.should_prune(1) for _ in range(3)] == [True, True, True]


def test_trials_side_by_side_are_compared_with_those_beside_them(tmp_path: Path) -> None:
    study = open_study(make_recipe(tmp_path, trials=6), tmp_path / "search")
    numbers = [asked.number for _ in range(6) if (asked := study.ask()) is not None]
    for number in numbers:
        study.report(number, 1, 1.0 + number)
    assert [study.should_prune(number) for number in numbers] == [False, True, True, True, True, True]


@pytest.mark.parametrize(
    ("lines", "space", "expected"),
    [
        ("", SPACE, 12),  # 3 epochs, 4 evaluations each
        ("train: {epochs: 2, evaluate_every: 0.5}", SPACE, 4),
        ("train: {epochs: 1, evaluate_every: 1}", SPACE, 1),
        ("", "{train.epochs: {low: 1, high: 5}}", 20),
        ("", "{train.epochs: [1, 2]}", 8),
        ("train: {max_steps: 30}", SPACE, 12),  # how many epochs these are, the data will tell
    ],
)
def test_how_long_a_trial_may_be_is_known_from_the_recipe(
    tmp_path: Path, lines: str, space: str, expected: int
) -> None:
    assert evaluations(make_recipe(tmp_path, space=space, lines=lines)) == expected


def test_brackets_are_settled_before_anything_ran(tmp_path: Path) -> None:
    made = pruner(make_recipe(tmp_path, pruner="hyperband"))
    assert isinstance(made, HyperbandPruner)
    assert (made._min_resource, made._max_resource, made._reduction_factor) == (1, 12, 3)


def test_rungs_are_at_the_first_third_and_ninth_evaluation(tmp_path: Path) -> None:
    study = open_study(make_recipe(tmp_path, trials=10), tmp_path / "search")
    assert isinstance(study.optuna.pruner, SuccessiveHalvingPruner)
    study.ask(), study.ask()
    for step in range(1, 13):
        study.report(0, step, 1.0)
        study.should_prune(0)
    judged = []
    for step in range(1, 13):  # as good as the other one where that is judged, and worse elsewhere
        study.report(1, step, 1.0 if step in (1, 3) else 2.0)
        judged.append(study.should_prune(1))
    assert judged.index(True) == 8


@pytest.mark.parametrize(("trials", "n_first"), [(3, 1), (16, 4), (100, 5)])
def test_the_median_is_that_of_a_few_trials_and_not_of_a_first_evaluation(
    tmp_path: Path, trials: int, n_first: int
) -> None:
    made = pruner(make_recipe(tmp_path, pruner="median", trials=trials))
    assert isinstance(made, MedianPruner)
    assert (made._n_startup_trials, made._n_warmup_steps) == (n_first, 2)


def test_seeds_of_trials_differ() -> None:
    assert len({seed_of(seed, number) for seed in range(20) for number in range(100)}) == 2000
