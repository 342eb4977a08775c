"""A search in words: its section in the run's card, the line above its plots, its tables."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.search.trials import say_value, short_names

_STATES = {
    "complete": "trained to the end",
    "pruned": "ended early",
    "failed": "failed",
    "lost": "lost and asked again",
    "running": "still running",
}


def search_markdown(facts: Mapping[str, Any]) -> str:
    """The section of a search in the run's card: what was best, the best five, what pruning saved, how to look."""
    counts, best = facts["trials"], facts["best"]
    lines = ["## Search", "", say_lead(facts), ""]
    if best is not None:
        lines += ["Best values:", "", *(f"- `{key}`: {_marked(value)}" for key, value in best["values"].items()), ""]
        names = short_names(list(dict.fromkeys(key for one in facts["best_trials"] for key in one["values"])))
        head = ["trial", "held-out loss", *names.values()]
        lines += [f"| {' | '.join(_cell(name) for name in head)} |", "|" + "---|" * len(head)]
        for one in facts["best_trials"]:
            values = [_marked(one["values"][key]) if key in one["values"] else "" for key in names]
            lines.append(f"| {' | '.join([str(one['number']), say_loss(one['loss']), *values])} |")
        lines.append("")
    if counts["pruned"] and facts["steps"]["planned"]:
        lines += [say_saved(facts), ""]
    if facts["kinds"]:
        columns, rows = kind_rows(facts["kinds"])
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [*(f"| {' | '.join(_cell(text) for text in row)} |" for row in rows), ""]
    recipe = "" if best is None else "; the best recipe: search/best.yaml"
    lines += [
        f"Every trial: search/trials.csv; plots: search/plots.html{recipe}. To look closer:",
        "",
        f"    optuna-dashboard {_place(facts)}",
        "",
    ]
    return "\n".join(lines)


def say_loss(loss: float) -> str:
    """A loss in nats a token with the digits that tell trials apart."""
    return f"{loss:.4f}"


def say_lead(facts: Mapping[str, Any]) -> str:
    """The search in two sentences: how many trials came to what end in which time, and the best."""
    counts, best = facts["trials"], facts["best"]
    n_ended = counts["complete"] + counts["pruned"] + counts["failed"]
    told = [f"{counts[state]:,} {says}" for state, says in _STATES.items() if counts[state]]
    text = f"{n_ended:,} trial{'s' * (n_ended != 1)} in {say_span(facts['seconds'])}"
    text += f": {', '.join(told)}. " if told else ". "
    if best is None:
        return text + "None of them was trained to the end."
    return text + f"The best, trial {best['number']}, came to a held-out loss of {say_loss(best['loss'])} nats a token."


def say_saved(facts: Mapping[str, Any]) -> str:
    """What pruning saved, as number and share."""
    steps = facts["steps"]
    return (
        f"Ending poor trials early saved {steps['saved_by_pruning']:,} of {steps['planned']:,} planned optimizer steps"
        f" ({100 * steps['saved_share']:.0f} %)."
    )


def kind_rows(kinds: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The table by adapter kind: columns and rows of texts."""
    columns = ("kind", "best held-out loss", "trial", "trainable parameters", "time", "memory", "trials")
    rows = [
        (
            one["kind"],
            _say_end(one),
            "" if one["number"] is None else str(one["number"]),
            "" if one["parameters"] is None else f"{one['parameters']:,.0f}",
            say_span(one["seconds"]),
            "" if one["memory_mb"] is None else f"{one['memory_mb']:,.0f} MB",
            str(one["ended"]),
        )
        for one in kinds
    ]
    return columns, tuple(rows)


def _say_end(kind: Mapping[str, Any]) -> str:
    if kind["loss"] is None:
        return "none"
    return say_loss(kind["loss"]) + ("" if kind["state"] == "complete" else " (ended early)")


def say_span(seconds: float | None) -> str:
    """A time in the unit that people would take; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _marked(value: Any) -> str:
    """A value inside Markdown: as code, in a table too."""
    return f"`{_cell(say_value(value).replace('`', chr(39)))}`"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _place(facts: Mapping[str, Any]) -> str:
    """What optuna-dashboard is to open."""
    return shlex.quote(facts["storage"] or f"runs/{facts['name']}/search/journal.log")
