"""CMA-ES that is replayed from the trials: what it finds, that it can be interrupted and shared, and what it keeps."""

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tests.search_world import loss_of, make_recipe, open_study, try_one, work
from toolkit.recipe.model import Recipe
from toolkit.search import cma, samplers
from toolkit.search.cma import Axis, ReplayedCmaEs, axes, replayed
from toolkit.search.hushed import hushed
from toolkit.search.ledger import LOST, REASON, TWICE
from toolkit.search.space import suggest
from toolkit.search.storage import JOURNAL

RATE, WARMUP, BATCH = "train.learning_rate", "train.warmup_ratio", "train.batch_size"
NUMBERS = (
    "{train.learning_rate: {low: 5.0e-5, high: 5.0e-3, log: true}, train.warmup_ratio: {low: 0.0, high: 0.5},"
    " train.batch_size: {low: 4, high: 64}}"
)
STEPS = "{train.warmup_ratio: {low: 0.0, high: 0.3, step: 0.1}, train.batch_size: {low: 4, high: 8}}"
NOT_LOADED = "not_loaded"


def cma_recipe(folder: Path, space: str = NUMBERS, **search: Any) -> Recipe:
    return make_recipe(folder, space=space, **{"sampler": "cmaes", "trials": 60, "pruner": "none", **search})


def seeded(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})


def quadratic(params: dict[str, Any]) -> float:
    """Lowest, at 0, away from the middle of every range and from the recipe's own values."""
    rate, warmup, batch = math.log10(params[RATE] / 4e-4), params[WARMUP] - 0.35, (params[BATCH] - 50) / 60
    return rate**2 + 9 * warmup**2 + 4 * batch**2


def propose(recipe: Recipe, trials: list[FrozenTrial]) -> dict[str, Any]:
    """The values of the trial that comes after these."""
    study = optuna.create_study()
    study.add_trials(trials)
    study.sampler = samplers.sampler(recipe, len(trials))
    trial = study.ask()
    suggest(trial, recipe)
    return trial.params


def minimise(recipe: Recipe, n_trials: int, loss: Callable[[dict[str, Any]], float]) -> list[FrozenTrial]:
    study = optuna.create_study()
    for number in range(n_trials):
        study.sampler = samplers.sampler(recipe, number)
        trial = study.ask()
        suggest(trial, recipe)
        study.tell(trial, loss(trial.params))
    return study.trials


def ended(recipe: Recipe, seed: int, state: TrialState = TrialState.COMPLETE, **other: Any) -> FrozenTrial:
    """A trial somewhere in the recipe's space, which came to 1 if it was trained to the end."""
    drawn = np.random.RandomState(seed).uniform(size=3)
    params = {axis.name: axis.from_unit(float(x)) for axis, x in zip(axes(recipe), drawn, strict=True)}
    shapes = {axis.name: axis.distribution for axis in axes(recipe)}
    value = 1.0 if state == TrialState.COMPLETE else None
    return create_trial(state=state, params=params, distributions=shapes, value=value, **other)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    cma._told.cache_clear()
    with hushed():
        yield


@pytest.mark.slow
def test_it_finds_the_minimum_better_than_chance(tmp_path: Path) -> None:
    best: dict[str, list[float]] = {"cmaes": [], "random": []}
    for kind, found in best.items():
        recipe = cma_recipe(tmp_path / kind, sampler=kind)
        for seed in range(15):  # of five, chance may be the luckier one
            trials = minimise(seeded(recipe, seed), 60, quadratic)
            found.append(min(quadratic(trial.params) for trial in trials))
    assert median(best["cmaes"]) < median(best["random"]) / 2
    assert sum(ours < theirs for ours, theirs in zip(best["cmaes"], best["random"], strict=True)) >= 12


def test_a_later_generation_is_nearer_to_the_minimum(tmp_path: Path) -> None:
    losses = [quadratic(trial.params) for trial in minimise(cma_recipe(tmp_path), 60, quadratic)]
    assert median(losses[-15:]) < median(losses[:15]) / 4


@pytest.mark.parametrize(
    "pruner",
    [
        "none",
        pytest.param("successive_halving", marks=pytest.mark.slow),
        pytest.param("hyperband", marks=pytest.mark.slow),
    ],
)
def test_a_restart_after_every_trial_is_a_search_without_one(tmp_path: Path, pruner: str) -> None:
    recipe = cma_recipe(tmp_path, trials=16, pruner=pruner)
    work(open_study(recipe, tmp_path / "whole"))
    for _ in range(16):
        cma._told.cache_clear()
        cma._begun.cache_clear()
        study = open_study(recipe, tmp_path / "pieces")
        try_one(study, study.ask())
        study.leave()
    whole, pieces = (open_study(recipe, tmp_path / name).trials() for name in ("whole", "pieces"))
    assert [(trial.params, trial.state) for trial in pieces] == [(trial.params, trial.state) for trial in whole]


@pytest.mark.parametrize(("space", "n_trials"), [(NUMBERS, 40), (STEPS, 20)])  # STEPS has 4 x 5 points
def test_two_workers_in_turns_never_propose_the_same_point(tmp_path: Path, space: str, n_trials: int) -> None:
    recipe = cma_recipe(tmp_path, space=space, trials=n_trials)
    workers, waiting, points = [open_study(recipe, tmp_path / "search") for _ in range(2)], [], []
    for turn in range(n_trials):  # every trial ends two turns later, at the worker that began it
        worker = workers[turn % 2]
        asked = worker.ask()
        assert asked is not None
        points.append(json.dumps(asked.params, sort_keys=True))
        waiting.append((worker, asked))
        if len(waiting) > 2:
            owner, done = waiting.pop(0)
            owner.finish(done.number, loss_of(done.params, 9), {})
    assert len(set(points)) == n_trials


def test_workers_that_see_the_same_trials_stand_at_the_same_place(tmp_path: Path) -> None:
    recipe = cma_recipe(tmp_path)
    trials = [ended(recipe, seed) for seed in range(30)]
    first = propose(recipe, trials)
    cma._told.cache_clear()
    assert propose(recipe, trials) == first
    assert propose(recipe, [*trials[:-1], ended(recipe, 99)]) != propose(recipe, [*trials[:3], *trials])


def test_the_first_generation_is_drawn_around_the_recipes_own_values(tmp_path: Path) -> None:
    recipe = cma_recipe(
        tmp_path, space="{train.weight_decay: {low: 0.0, high: 0.1}, train.batch_size: {low: 2, high: 512}}"
    )
    study = open_study(recipe, tmp_path / "search")
    asked = [study.ask() for _ in range(40)]
    batches = [one.params[BATCH] for one in asked if one is not None]
    assert batches[0] == 8  # where the middle is 257
    assert median(batches) < 200


def test_what_auto_stands_for_is_the_start_of_its_range(tmp_path: Path) -> None:
    recipe = cma_recipe(tmp_path, space="{train.learning_rate: {low: 1.0e-8, high: 1.0e-2, log: true}}")
    study = open_study(recipe, tmp_path / "search")  # `auto` is 3e-3 here, the middle 1e-5
    rates = [one.params[RATE] for _ in range(60) if (one := study.ask()) is not None]
    assert rates[0] == 0.003
    assert 3e-5 < median(rates)


def test_a_recipe_outside_its_space_starts_in_the_middle(tmp_path: Path) -> None:
    recipe = cma_recipe(tmp_path, space="{train.batch_size: {low: 100, high: 500}}")
    batches = [propose(seeded(recipe, seed), [])[BATCH] for seed in range(60)]
    assert 260 < median(batches) < 340


@pytest.mark.parametrize("space", (NUMBERS, STEPS))
def test_all_values_keep_their_bounds_and_steps(tmp_path: Path, space: str) -> None:
    recipe = cma_recipe(tmp_path, space=space)
    for trial in minimise(recipe, 30, lambda params: -params[WARMUP] - params[BATCH]):
        assert all(type(trial.params[axis.name]) is type(axis.distribution.low) for axis in axes(recipe))
        assert all(axis.holds(trial.params[axis.name]) for axis in axes(recipe))
        if space == STEPS:
            assert trial.params[WARMUP] in (0.0, 0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("distribution", "units", "values"),
    [
        (FloatDistribution(1e-4, 1e-2, log=True), (0.0, 0.5, 1.0), (1e-4, 1e-3, 1e-2)),
        (FloatDistribution(-2.0, 6.0), (0.0, 0.25, 1.0), (-2.0, 0.0, 6.0)),
        (FloatDistribution(0.0, 0.3, step=0.1), (0.0, 0.24, 0.26, 0.8, 1.0), (0.0, 0.0, 0.1, 0.3, 0.3)),
        (IntDistribution(4, 7), (0.0, 0.24, 0.26, 0.74, 0.76, 1.0), (4, 4, 5, 6, 7, 7)),
        (IntDistribution(10, 30, step=10), (0.0, 0.32, 0.34, 0.66, 0.68, 1.0), (10, 10, 20, 20, 30, 30)),
        (IntDistribution(1, 2, log=True), (0.0, 0.68, 0.69, 1.0), (1, 1, 2, 2)),  # 1 is log 0.5 to log 1.5
    ],
)
def test_every_value_of_a_range_has_its_part_of_it(
    distribution: Any, units: tuple[float, ...], values: tuple[float, ...]
) -> None:
    axis = Axis("x", "x", distribution)
    assert [axis.from_unit(unit) for unit in units] == pytest.approx(values, rel=1e-12)
    assert all(axis.from_unit(axis.to_unit(value)) == pytest.approx(value, rel=1e-12) for value in values)


def test_steps_are_free_of_the_rounding_of_their_sum() -> None:
    axis = Axis("x", "x", FloatDistribution(0.0, 0.7, step=0.1))
    assert [axis.from_unit((i + 0.5) / 8) for i in range(8)] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def test_the_ends_of_a_logarithmic_range_are_not_passed_by_rounding() -> None:
    ends = [(low * 1.1e-5, low * 1.7e-3) for low in range(1, 200)]
    assert any(math.exp(math.log(high)) > high for _, high in ends)
    for low, high in ends:
        axis = Axis("x", "x", FloatDistribution(low, high, log=True))
        assert low <= axis.from_unit(0.0) < axis.from_unit(1.0) <= high


def rank(recipe: Recipe, trial: FrozenTrial) -> tuple[int, float, float]:
    counts = recipe.search is not None and recipe.search.pruner != "hyperband"
    return ReplayedCmaEs(recipe, seed=0, counts_pruned=counts)._rank(trial)


def test_a_pruned_trial_counts_by_its_last_loss(tmp_path: Path) -> None:
    recipe = cma_recipe(tmp_path)
    worse, better = (ended(recipe, 0, TrialState.PRUNED, intermediate_values={1: 0.5, 2: loss}) for loss in (1.5, 0.7))
    assert rank(recipe, better) < rank(recipe, ended(recipe, 0)) < rank(recipe, worse)


def test_in_brackets_a_pruned_trial_is_behind_and_the_longer_the_better(tmp_path: Path) -> None:
    recipe = cma_recipe(tmp_path, pruner="hyperband")
    short, long = (ended(recipe, 0, TrialState.PRUNED, intermediate_values={step: 0.5}) for step in (1, 3))
    assert rank(recipe, ended(recipe, 0)) < rank(recipe, long) < rank(recipe, short)


def test_what_came_to_nothing_is_the_worst(tmp_path: Path) -> None:
    recipe = cma_recipe(tmp_path)
    pruned = ended(recipe, 0, TrialState.PRUNED, intermediate_values={1: 9.0})
    for worst in (
        ended(recipe, 0, TrialState.PRUNED, intermediate_values={1: math.nan}),
        ended(recipe, 0, TrialState.PRUNED),
        ended(recipe, 0, TrialState.FAIL, user_attrs={REASON: "its loss is nan"}),
    ):
        assert rank(recipe, pruned) < rank(recipe, worst)


@pytest.mark.parametrize("reason", (LOST, TWICE))
def test_lost_and_void_trials_do_not_count(tmp_path: Path, reason: str) -> None:
    recipe = cma_recipe(tmp_path)
    trials = [ended(recipe, seed) for seed in range(14)]
    gone = [ended(recipe, 50 + seed, TrialState.FAIL, user_attrs={REASON: reason}) for seed in range(7)]
    made = ReplayedCmaEs(recipe, seed=0, counts_pruned=True)
    assert made._ranked([*gone, *trials]) == made._ranked(trials)
    failed = [ended(recipe, 50, TrialState.FAIL, user_attrs={REASON: "no memory"})]
    assert len(made._ranked([*failed, *trials])) == 15


def test_a_generation_waits_until_it_is_full(tmp_path: Path) -> None:
    made = ReplayedCmaEs(cma_recipe(tmp_path), seed=0, counts_pruned=True)
    points = made._ranked([ended(cma_recipe(tmp_path), seed) for seed in range(15)])
    assert [replayed((0.5,) * 3, points[:n]).generation for n in (0, 6, 7, 13, 14, 15)] == [0, 0, 1, 1, 2, 2]


def test_a_search_at_rest_begins_anew() -> None:
    same = [((0, float(i), 0.0), (0.5,)) for i in range(2000)]
    optimizer = replayed((0.5,), same)
    assert optimizer.generation < 400


def test_points_far_apart_do_not_break_it() -> None:
    rng, points = np.random.RandomState(0), []
    for i in range(3000):
        at = rng.uniform(size=2) if i % 7 == 0 else np.array([0.3, 0.3]) + 1e-13 * rng.randn(2)
        points.append(((0, float(rng.rand()), 0.0), tuple(map(float, at))))
    assert np.isfinite(replayed((0.5, 0.5), points).mean).all()


def test_the_storage_holds_nothing_of_the_optimizer(tmp_path: Path) -> None:
    study = open_study(cma_recipe(tmp_path, trials=20), tmp_path / "search")
    work(study)
    assert len(study.trials()) == 20
    assert [sorted(trial.system_attrs) for trial in study.trials()] == [["fixed_params"]] + 19 * [[]]
    journal = (tmp_path / "search" / JOURNAL).read_text(encoding="utf-8")
    assert "train.learning_rate" in journal
    assert "cma:" not in journal
    assert f'"{pickle.dumps(0)[:2].hex()}' not in journal  # how a pickle written in hexadecimal begins


class Boobytrap:
    """Writes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_pickle_under_optunas_own_key_is_not_loaded(tmp_path: Path) -> None:
    recipe, trap = cma_recipe(tmp_path, trials=12), tmp_path / NOT_LOADED
    params = []
    for name in ("clean", "laid"):
        study = open_study(recipe, tmp_path / name)
        for number in range(8):
            asked = study.ask()
            assert asked is not None
            if name == "laid":
                trial_id = study.optuna.trials[number]._trial_id
                keep, code = study.optuna._storage.set_trial_system_attr, pickle.dumps(Boobytrap(trap)).hex()
                keep(trial_id, "cma:optimizer:0", code)
                keep(trial_id, "cma:generation", 0)
            study.finish(asked.number, loss_of(asked.params, 9), {})
        study.leave()
        again = open_study(recipe, tmp_path / name)
        work(again)
        params.append([trial.params for trial in again.trials()])
    assert "cma:optimizer:0" in (tmp_path / "laid" / JOURNAL).read_text(encoding="utf-8")
    assert not trap.exists()
    assert params[0] == params[1]
    pickle.loads(pickle.dumps(Boobytrap(trap)))
    assert trap.exists()  # it would have been seen
