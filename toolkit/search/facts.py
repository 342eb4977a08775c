"""What a search found, in numbers: the best, counts, steps, costs by kind, and which parameters mattered."""

import math
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url

from toolkit.recipe.model import Recipe
from toolkit.recipe.search import dimensions
from toolkit.search.hushed import hushed
from toolkit.search.trials import by_loss, count, final_loss, is_repeated, kind_of, lowest_loss, number_of

N_BEST = 5
FEWEST = 10  # trials with a loss; with fewer the importances of a seed are not those of the next one
TOP = 0.34  # the best third against all: with the usual tenth, 16 trials would be judged by two


def facts_of(trials: Sequence[FrozenTrial], recipe: Recipe) -> dict[str, Any]:
    """What run.json says of a search, as JSON; `best` is None and the lists are empty where no trial has a loss."""
    counts, ordered = count(trials), by_loss(trials)
    best = [_told(trial, recipe) for trial in ordered[:N_BEST]]
    storage = recipe.search.storage if recipe.search is not None else None
    importances, note = importances_of(trials)
    return {
        "name": recipe.name,
        "storage": _shown(storage) if storage else None,
        "best": best[0] if best else None,
        "best_trials": best,
        "trials": {
            "complete": counts.complete,
            "pruned": counts.pruned,
            "failed": counts.failed,
            "lost": counts.lost,
            "running": counts.running,
        },
        "steps": _steps(trials),
        "seconds": round(_busy_seconds(trials), 1),
        "kinds": _kinds(trials),
        "importances": importances,
        "importances_note": note,
    }


def _shown(storage: str) -> str:
    """A storage as optuna-dashboard takes it, with *** for the password."""
    url = make_url(storage).difference_update_query(["password"])
    is_postgres = url.get_backend_name() == "postgresql"
    return (url.set(drivername="postgresql+psycopg") if is_postgres else url).render_as_string(hide_password=True)


def _told(trial: FrozenTrial, recipe: Recipe) -> dict[str, Any]:
    seconds = number_of(trial, "seconds")
    told = {"number": trial.number, "loss": final_loss(trial), "values": values_of(trial, recipe)}
    return told | ({} if seconds is None else {"seconds": round(seconds, 1)})


def values_of(trial: FrozenTrial, recipe: Recipe) -> dict[str, Any]:
    """The trial's parameters by recipe key: `lora/rank` of a trial with a lora is adapter.rank."""
    keys = {dimension.name: dimension.key for dimension in dimensions(recipe)}
    return {keys.get(name, name): value for name, value in trial.params.items()}


def _steps(trials: Sequence[FrozenTrial]) -> dict[str, Any]:
    """Optimizer steps: taken by all trials, planned for those that count, and left out because they were pruned."""
    saved = planned = 0
    for trial in trials:
        steps, all_steps = number_of(trial, "steps"), number_of(trial, "steps_planned")
        if is_repeated(trial) or not trial.state.is_finished() or steps is None or all_steps is None:
            continue
        planned += int(all_steps)
        saved += max(0, int(all_steps - steps)) if trial.state == TrialState.PRUNED else 0
    taken = int(sum(number_of(trial, "steps") or 0 for trial in trials))
    share = round(saved / planned, 4) if planned else 0.0
    return {"taken": taken, "planned": planned, "saved_by_pruning": saved, "saved_share": share}


def _busy_seconds(trials: Sequence[FrozenTrial]) -> float:
    """For how long at least one trial ran: a pause between two starts of the search is not in it."""
    spans = sorted(
        (trial.datetime_start.timestamp(), trial.datetime_complete.timestamp())
        for trial in trials
        if trial.datetime_start is not None and trial.datetime_complete is not None and not is_repeated(trial)
    )
    busy, until = 0.0, -math.inf
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def _kinds(trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """For each adapter kind that was tried, its best trial with what it cost; the best kind first.

    A kind whose trials were all ended early has the one that came lowest, and its state says so.
    """
    found = []
    for kind in dict.fromkeys(kind for trial in trials if (kind := kind_of(trial)) is not None):
        own = [trial for trial in trials if kind_of(trial) == kind and not is_repeated(trial)]
        lowest = [trial for trial in own if trial.state == TrialState.PRUNED and lowest_loss(trial) is not None]
        best = next(iter([*by_loss(own), *sorted(lowest, key=lambda trial: lowest_loss(trial) or 0.0)]), None)
        told: dict[str, Any] = {"kind": kind, "ended": count(own).ended, "loss": None, "number": None, "state": None}
        if best is not None:
            told |= {"loss": lowest_loss(best), "number": best.number, "state": best.state.name.lower()}
        costs = {name: number_of(best, name) if best else None for name in ("parameters", "seconds", "memory_mb")}
        found.append(told | costs)
    return sorted(found, key=lambda one: (one["state"] != "complete", math.inf if one["loss"] is None else one["loss"]))


def importances_of(trials: Sequence[FrozenTrial]) -> tuple[dict[str, float], str]:
    """How much each parameter tells the best third of the trials from all of them, as shares; or why that is not told.

    A pruned trial counts with the lowest loss it came to. A parameter of one kind only is weighed by how often that
    kind was tried. Source: PED-ANOVA, arXiv 2304.10255, and for conditional spaces arXiv 2601.20800, as in Optuna.
    """
    with hushed():
        found, n_known = _divergences(trials)
    if n_known < FEWEST:
        return {}, f"Too few trials to tell what mattered: {n_known} with a loss, {FEWEST} are needed."
    total = sum(found.values())
    if not total > 0 or not math.isfinite(total):
        return {}, "No parameter told the good trials from the others."
    ordered = sorted(found.items(), key=lambda one: -one[1])
    note = f"From {n_known} trials: a rough order, not a measurement." if n_known < 4 * FEWEST else ""
    return {name: round(float(value / total), 4) for name, value in ordered}, note


def _divergences(trials: Sequence[FrozenTrial]) -> tuple[dict[str, float], int]:
    """For each parameter, how far its values in the best trials are from those in all, and how many trials that is."""
    study = optuna.create_study()
    for trial in trials:
        loss = lowest_loss(trial) if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
        if loss is not None and trial.params:
            copy = optuna.create_trial(value=loss, params=trial.params, distributions=trial.distributions)
            study.add_trial(copy)
    n_known = len(study.get_trials(deepcopy=False))
    if n_known < FEWEST:
        return {}, n_known
    evaluator = PedAnovaImportanceEvaluator(target_quantile=TOP)
    return get_param_importances(study, evaluator=evaluator, normalize=False), n_known
