"""The sampler that proposes a trial's values, and the pruner that ends a bad trial early.

A sampler is made anew for every trial and seeded by the recipe's seed and the trial's number, which no other trial of
any worker has: so the same trials before it give the same proposal, a restart goes on where it was, and nothing that
was proposed comes again for want of another seed.
"""

import math

import numpy as np
import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler

from toolkit.recipe.model import Recipe
from toolkit.recipe.search import Range, dimensions
from toolkit.search.cma import ReplayedCmaEs
from toolkit.search.space import is_whole

REDUCTION = 3  # of three trials that come to a rung, about one goes on
USUAL_EVALUATIONS = 12
FEWEST_AT_RANDOM, MOST_AT_RANDOM = 4, 10
WARM_UP = 2  # the first evaluation says more about the warm-up of the learning rate than about the trial


def sampler(recipe: Recipe, number: int) -> BaseSampler:
    """What proposes the values of the trial with this number.

    grid: the study itself walks over the grid (Optuna's GridSampler cannot be asked, and would take a point that was
    given to nobody for done); what is left to sample is sampled at random.
    """
    search = recipe.search
    kind = search.sampler if search is not None else "random"
    seed = seed_of(recipe.train.seed, number)
    at_random = RandomSampler(seed=seed)
    n_first = _first_at_random(recipe)
    if kind == "tpe":
        has_branches = any(dimension.when is not None for dimension in dimensions(recipe))
        return TPESampler(
            seed=seed, n_startup_trials=n_first, multivariate=True, group=has_branches, constant_liar=True
        )
    if kind == "gp":  # it learns from trials that were trained to the end, of which a pruner leaves about a third
        n_first = n_first if search is not None and search.pruner == "none" else math.ceil(n_first / REDUCTION)
        return GPSampler(
            seed=seed, n_startup_trials=n_first, independent_sampler=at_random, warn_independent_sampling=False
        )
    if kind == "cmaes":  # a pruned trial counts by its last loss, except in brackets, which end at other lengths
        is_in_brackets = search is not None and search.pruner == "hyperband"
        return ReplayedCmaEs(recipe, seed=seed, counts_pruned=not is_in_brackets)
    if kind == "qmc":  # one sequence for all workers: its seed is the recipe's alone
        return QMCSampler(
            scramble=True, seed=recipe.train.seed, independent_sampler=at_random, warn_independent_sampling=False
        )
    return at_random


def seed_of(seed: int, number: int) -> int:
    """A seed for one trial."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _first_at_random(recipe: Recipe) -> int:
    n_trials = recipe.search.trials if recipe.search is not None else 0
    return max(FEWEST_AT_RANDOM, min(n_trials // 3, MOST_AT_RANDOM))


def may_repeat(recipe: Recipe) -> bool:
    """Whether two trials may have the same values by good right: no dimension has a number for each of them."""
    return not any(
        isinstance(one.values, Range) and one.values.step is None and not is_whole(one.values)
        for one in dimensions(recipe)
    )


def pruner(recipe: Recipe) -> BasePruner:
    """What ends bad trials early. Its steps are evaluations, counted from 1; those before the learning rate has risen
    are reported and not judged.

    successive_halving compares a trial with all that came to its rung (evaluations 1, 3, 9, …), those beside it
    included, in the order in which they report: it never waits, and the first at a rung always goes on. median
    compares with trials that were trained to the end only, so trials of a first wave side by side all finish.
    hyperband has brackets that begin to prune at 1, 3 and 9; how many there are is settled by the recipe before
    anything ran, because workers that counted differently would put one trial into two brackets.
    """
    kind = recipe.search.pruner if recipe.search is not None else "none"
    if kind == "successive_halving":
        return SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
    if kind == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=evaluations(recipe), reduction_factor=REDUCTION)
    if kind == "median":
        n_trials = recipe.search.trials if recipe.search is not None else 0
        return MedianPruner(n_startup_trials=max(1, min(n_trials // 4, 5)), n_warmup_steps=WARM_UP)
    return NopPruner()


def evaluations(recipe: Recipe) -> int:
    """How many evaluations the longest trial has, as far as the recipe alone tells."""
    by_key = {dimension.key: dimension.values for dimension in dimensions(recipe)}
    if recipe.train.max_steps is not None or "train.max_steps" in by_key:
        return USUAL_EVALUATIONS
    values = by_key.get("train.epochs", (recipe.train.epochs,))
    longest = values.high if isinstance(values, Range) else max(float(value) for value in values if value is not None)
    return max(1, math.ceil(longest / recipe.train.evaluate_every - 1e-6))


def seen_by(number: int, name: str, storage: optuna.storages.BaseStorage, recipe: Recipe) -> optuna.study.Study:
    """The study as one trial sees it: with the sampler of its number, and nothing remembered of an earlier look.

    It has no pruner: with Hyperband's the sampler would learn from the trials of one bracket only, which of 16 trials
    leaves it at random to the end.
    """
    return optuna.load_study(study_name=name, storage=storage, sampler=sampler(recipe, number), pruner=NopPruner())
