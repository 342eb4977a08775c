"""What a search leaves behind: trials.csv, best.yaml, plots.html, and the facts that run.json and the card tell."""

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from toolkit.disk import write_text
from toolkit.recipe.model import Recipe
from toolkit.recipe.search import dimensions, with_values
from toolkit.recipe.show import to_yaml
from toolkit.search import ledger
from toolkit.search.facts import facts_of, values_of
from toolkit.search.ledger import AGAIN_OF, REASON
from toolkit.search.plots import Grid, draw, page
from toolkit.search.trials import final_loss, lowest_loss, number_of, say_values
from toolkit.search.words import kind_rows, say_lead, say_loss, say_span, search_markdown

__all__ = ["search_markdown", "write_results"]

NUMBERS = ("best_step", "steps", "steps_planned", "seconds", "n_tokens", "parameters", "memory_mb")
ENDS = ("started", "ended", AGAIN_OF, REASON)
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r", "\n")  # a spreadsheet takes a text that opens so for a formula


def write_results(study: optuna.study.Study, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Write trials.csv, plots.html and, where a trial has a loss, best.yaml into `folder`; returns the facts as JSON.

    Each file is whole or as it was. Works with any trials, none at all too. Raises DiskError.
    """
    tried = (trial for trial in study.get_trials(deepcopy=False) if not ledger.is_void(trial))
    trials = sorted(tried, key=lambda trial: trial.number)
    facts = facts_of(trials, recipe)
    plots = draw(trials, facts["importances"], facts["importances_note"])
    html = page(recipe.name, say_lead(facts), _grids(facts), plots)
    write_text(folder / "trials.csv", _csv(trials, recipe))
    write_text(folder / "plots.html", html)
    if facts["best"] is not None:
        write_text(folder / "best.yaml", _best_recipe(recipe, facts["best"]))
    return facts


def _csv(trials: Sequence[FrozenTrial], recipe: Recipe) -> str:
    """A row a trial, a column a recipe key; numbers as they are, texts that no spreadsheet runs."""
    values = [values_of(trial, recipe) for trial in trials]
    keys = [dimension.key for dimension in dimensions(recipe)] + [key for own in values for key in own]
    keys = list(dict.fromkeys(keys))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_safe(name) for name in ("number", "state", "loss", "lowest_loss", *keys, *NUMBERS, *ENDS))
    for trial, own in zip(trials, values, strict=True):
        attrs = trial.user_attrs
        row = [trial.number, trial.state.name.lower(), final_loss(trial), lowest_loss(trial)]
        row += ["null" if key in own and own[key] is None else own.get(key) for key in keys]
        row += [number_of(trial, name) for name in NUMBERS]
        row += [
            _clock(trial.datetime_start),
            _clock(trial.datetime_complete),
            attrs.get("again_of"),
            attrs.get("reason"),
        ]
        writer.writerow(_safe(value) for value in row)
    return out.getvalue()


def _clock(when: datetime | None) -> str | None:
    return None if when is None else when.isoformat(" ", "seconds")


def _safe(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return f"'{text}" if text.startswith(FORMULA_SIGNS) else text


def _best_recipe(recipe: Recipe, best: Mapping[str, Any]) -> str:
    """The recipe with the best values, as `python -m toolkit.train` takes it."""
    chosen = with_values(recipe, best["values"])
    name = recipe.name.encode()[: 200 - len("_best")].decode(errors="ignore") + "_best"
    text = to_yaml(chosen.model_copy(update={"name": name, "search": None}))
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("search:")]
    command = shlex.quote(f"runs/{recipe.name}/search/best.yaml")
    says = f"Trial {best['number']} of a search came to a held-out loss of {say_loss(best['loss'])} nats a token."
    return f"# python -m toolkit.train {command}\n# {says}\n" + "".join(lines)


def _grids(facts: Mapping[str, Any]) -> list[Grid]:
    rows = [
        (say_values(one["values"]), str(one["number"]), say_loss(one["loss"]), say_span(one.get("seconds")))
        for one in facts["best_trials"]
    ]
    columns, kinds = kind_rows(facts["kinds"])
    steps = facts["steps"]
    saved = [("optimizer steps taken", f"{steps['taken']:,}"), ("planned", f"{steps['planned']:,}")]
    saved += [("saved by ending trials early", f"{steps['saved_by_pruning']:,} ({100 * steps['saved_share']:.0f} %)")]
    return [
        Grid("The best trials", ("values", "trial", "held-out loss", "time"), tuple(rows)),
        Grid("Kinds of adapter compared", columns, kinds),
        Grid("Work", ("", ""), tuple(saved) if steps["planned"] else ()),
    ]
