"""The page of a search: what was found, in tables, and Optuna's plots, in one HTML file that needs no network.

The plots are drawn from a copy of the study that holds nothing but numbers, values and losses: so nothing else of a
trial gets into the page, and a loss that is not finite does not spoil an axis.
"""

import ast
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import plot_optimization_history, plot_parallel_coordinate, plot_slice
from plotly.offline import get_plotlyjs

from toolkit.search.hushed import hushed
from toolkit.search.trials import by_loss, is_repeated, lowest_loss

LOSS = "held-out loss (nats a token)"
PAGE_WIDTH, SLICE_WIDTH, AXIS_WIDTH = 1060, 260, 140  # pixels: what does not fit the page is scrolled to
FIT_PANELS, FIT_AXES = 4, 7
MOST_LINES = 500  # trials in a plot with a line for each: more cannot be told apart, and browsers grow slow
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
RINGS = "Dots: trained to the end. Rings: ended early."
EARLY = "A trial that was ended early is drawn at the lowest loss it came to."
FONT = 'system-ui, "Noto Sans KR", "Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans CJK KR", sans-serif'
BLUE, ORANGE, GREY = "#3b82d6", "#d97a26", "#8a8f98"  # all three show on white and on black
EARLY_TO_LATE = [[0.0, "#b9a46a"], [1.0, "#2f8f6b"]]


@dataclass(frozen=True)
class Plot:
    """A plot under its heading; no figure where there is nothing to draw, and `says` why."""

    heading: str
    says: str
    figure: go.Figure | None


@dataclass(frozen=True)
class Grid:
    """A table of the page: a heading, the names of the columns, and rows of texts."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def page(name: str, lead: str, grids: Sequence[Grid], plots: Sequence[Plot]) -> str:
    """The whole page as HTML: plotly.js stands in it once, and its policy forbids the browser every request."""
    parts = [_grid(grid) for grid in grids if grid.rows] + [_plot(plot, i) for i, plot in enumerate(plots)]
    script = f"<script>{get_plotlyjs()}</script>" if any(plot.figure is not None for plot in plots) else ""
    title = html.escape(name)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_POLICY}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: search</title>\n<style>{_STYLE}</style>\n{script}\n</head>\n<body>\n"
        f"<h1>{title}: search</h1>\n<p>{html.escape(lead)}</p>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def draw(trials: Sequence[FrozenTrial], importances: Mapping[str, float], note: str) -> list[Plot]:
    """History, curves of the trials, parallel coordinates, slices and importances, in this order.

    `note` says why there are no importances, where there are none.
    """
    known = [trial for trial in trials if trial.state in ENDED and lowest_loss(trial) is not None]
    has_values = any(trial.params for trial in known)
    early = EARLY if any(trial.state == TrialState.PRUNED for trial in known) else ""
    rings = f"{RINGS} {EARLY}" if early else ""
    nothing = "No trial ended with a loss." if not known else "" if has_values else "The trials have no parameters."
    with hushed():
        return [
            _history(trials),
            _curves(trials),
            Plot("All parameters at once", nothing or early, None if nothing else _parallel(known)),
            Plot("Each parameter alone", nothing or rings, None if nothing else _slices(known)),
            Plot("What mattered", note, _bars(importances) if importances else None),
        ]


def _copy(trials: Sequence[FrozenTrial], n_trials: int = 0) -> optuna.Study:
    """The same trials under the same numbers in memory, each with its lowest loss; of `n_trials` the others are
    empty.
    """
    study = optuna.create_study()
    shown = {trial.number: trial for trial in trials}
    for number in range(max(n_trials, max(shown, default=-1) + 1)):
        trial = shown.get(number)
        loss = None if trial is None else lowest_loss(trial)
        bare = optuna.create_trial(state=TrialState.FAIL)
        if trial is not None and loss is not None:
            bare = optuna.create_trial(value=loss, params=trial.params, distributions=trial.distributions)
        study.add_trial(bare)
    return study


def _history(trials: Sequence[FrozenTrial]) -> Plot:
    """The loss of every trial, and the best so far."""
    figure = plot_optimization_history(_copy(by_loss(trials), len(trials)), target_name=LOSS)
    names = {LOSS: ("trained to the end", BLUE), "Best Value": ("best so far", ORANGE)}
    kept = [trace for trace in figure.data if trace.name in names]
    for trace in kept:
        name, color = names[trace.name]
        trace.update(name=name, marker={"color": color, "size": 8}, line={"color": color})
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    lowest = [(trial.number, loss) for trial in pruned if (loss := lowest_loss(trial)) is not None]
    if lowest:
        marker = {"symbol": "x-thin", "size": 8, "line": {"width": 1.6, "color": GREY}}
        numbers, losses = zip(*lowest, strict=True)
        kept.append(go.Scatter(x=numbers, y=losses, mode="markers", marker=marker, name="ended early, its lowest"))
    heading = "How the search went"
    if not kept:
        return Plot(heading, "No trial ended with a loss.", None)
    return Plot(heading, "", _styled(go.Figure(data=kept), "trial", LOSS).update_layout(showlegend=True))


def _curves(trials: Sequence[FrozenTrial]) -> Plot:
    """Held-out losses while training; the best trial in front."""
    best = next(iter(by_loss(trials)), None)
    shown = sorted(
        (trial for trial in trials if not is_repeated(trial)), key=lambda trial: (trial is best, trial.number)
    )
    traces = []
    for trial in shown[-MOST_LINES:]:
        points = [(step, loss) for step, loss in sorted(trial.intermediate_values.items()) if math.isfinite(loss)]
        if points:
            color = ORANGE if trial is best else BLUE if trial.state == TrialState.COMPLETE else GREY
            traces.append(_curve(trial, points, color))
    if not traces:
        return Plot("While the trials learned", "No trial reported a loss.", None)
    says = "Orange: the best trial. Blue: trained to the end. Grey: ended early, or failed."
    return Plot("While the trials learned", says, _styled(go.Figure(data=traces), "evaluation", LOSS))


def _curve(trial: FrozenTrial, points: Sequence[tuple[int, float]], color: str) -> go.Scatter:
    return go.Scatter(
        x=[step for step, _ in points],
        y=[loss for _, loss in points],
        mode="lines+markers",
        name=f"trial {trial.number}",
        showlegend=False,
        line={"color": color, "width": 3 if color == ORANGE else 1.4},
        marker={"color": color, "size": 5},
    )


def _parallel(known: Sequence[FrozenTrial]) -> go.Figure:
    """A line a trial through all its parameters, from the loss; the better, the bluer and the stronger."""
    best = sorted(known, key=lambda trial: lowest_loss(trial) or 0.0)[:MOST_LINES]
    figure = plot_parallel_coordinate(_copy(best), target_name="held-out loss")
    n_axes = 1 + len({name for trial in best for name in trial.params})
    for trace in figure.data:
        if trace.mode == "lines":
            share = float(trace.y[0])  # the first axis is the loss, from 0 for the lowest to 1
            trace.update(line={"color": _between(share), "width": 2.8 - 1.6 * share}, opacity=0.95 - 0.45 * share)
        else:
            trace.update(marker={"colorscale": [[0.0, BLUE], [1.0, ORANGE]], "reversescale": False})
    figure.for_each_annotation(lambda note: note.update(text="not used") if note.text == "None" else None)
    return _styled(figure).update_layout(width=max(n_axes * AXIS_WIDTH, PAGE_WIDTH) if n_axes > FIT_AXES else None)


def _between(share: float) -> str:
    """The color between blue and orange."""
    ends = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (BLUE, ORANGE)]
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(*ends, strict=True))
    return f"rgb({red},{green},{blue})"


def _slices(known: Sequence[FrozenTrial]) -> go.Figure:
    """A panel a parameter: the loss over its values."""
    figure = plot_slice(_copy(known), target_name=LOSS)
    pruned = {trial.number for trial in known if trial.state == TrialState.PRUNED}
    bar = {"title": "trial", "x": 1.0, "xpad": 20, "tickformat": "d", "dtick": max(1, len(known) // 6)}
    for trace in figure.data:
        rings = ["circle-open" if number in pruned else "circle" for number in trace.marker.color]
        outlines = {"width": [1.6 if ring == "circle-open" else 0 for ring in rings]}
        look = {"symbol": rings, "colorscale": EARLY_TO_LATE, "size": 9, "colorbar": bar, "line": outlines}
        trace.update(marker=look, x=[_unquoted(x) for x in trace.x], name="")
    n_panels = len({name for trial in known for name in trial.params})
    figure.for_each_xaxis(_tidy)
    return _styled(figure).update_layout(width=n_panels * SLICE_WIDTH if n_panels > FIT_PANELS else None)


def _tidy(axis: Any) -> None:
    """Categories as they are written in a recipe; few and level numbers on a logarithmic axis."""
    axis.update(tickangle=0, exponentformat="e", nticks=5, zeroline=False)
    if axis.categoryarray:
        axis.update(categoryarray=[_unquoted(x) for x in axis.categoryarray])
    if axis.type == "log":
        axis.update(dtick="D2")


def _unquoted(value: Any) -> Any:
    """Optuna writes a category as Python does; `'lora'` is lora here."""
    return ast.literal_eval(value) if isinstance(value, str) and value[:1] in ("'", '"') else value


def _bars(importances: Mapping[str, float]) -> go.Figure:
    """Shares, the largest on top."""
    names = list(importances)[::-1]
    shares = [importances[name] for name in names]
    texts = [f" {100 * share:.0f} %" for share in shares]
    bars = go.Bar(x=shares, y=names, orientation="h", text=texts, textposition="outside", marker={"color": BLUE})
    figure = _styled(go.Figure(data=[bars]), "share of the difference between good trials and all trials", "")
    figure.update_layout(height=150 + 34 * len(names), xaxis={"range": [0, 1.12], "tickformat": ".0%"})
    return figure.update_yaxes(type="category", automargin=True)


def _styled(figure: go.Figure, x: str | None = None, y: str | None = None) -> go.Figure:
    """The page's own look: no background, no title of Optuna's, the page's font."""
    clear = "rgba(0,0,0,0)"
    figure.update_layout(
        template="none",
        title=None,
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        font={"family": FONT, "size": 13},
        margin={"l": 70, "r": 30, "t": 40, "b": 60},
        hoverlabel={"bgcolor": "#ffffff", "bordercolor": GREY, "font": {"color": "#1b1f24", "family": FONT}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    if x is not None:
        figure.update_xaxes(title_text=x, zeroline=False)
        figure.update_yaxes(title_text=y, zeroline=False)
    return figure


def _grid(grid: Grid) -> str:
    rows = [_row("th", grid.columns), *(_row("td", row) for row in grid.rows)]
    return f'<h2>{html.escape(grid.heading)}</h2>\n<div class="wide"><table>\n' + "\n".join(rows) + "\n</table></div>"


def _row(tag: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"


def _plot(plot: Plot, number: int) -> str:
    says = f"<p>{html.escape(plot.says)}</p>" if plot.says else ""
    if plot.figure is None:
        return f"<h2>{html.escape(plot.heading)}</h2>\n{says}"
    drawn = plot.figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{number}",
        config={"displaylogo": False, "responsive": True},
    )
    return f'<h2>{html.escape(plot.heading)}</h2>\n{says}<div class="wide">{drawn}</div>'


# `unsafe-eval` is for plotly.js, which compiles some of its drawing; nothing may be fetched from anywhere.
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data: blob:;'
    " style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'\">"
)
_STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1b1f24; --soft: #59616b; --line: #d5d9de; --page: #ffffff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8eb; --soft: #a3abb5; --line: #3a4048; --page: #16191d; }}
}}
body {{ margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: var(--ink); background: var(--page);
  font: 16px/1.5 {FONT}; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin: 2.2rem 0 0.4rem; }}
p {{ color: var(--soft); margin: 0.2rem 0; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 0.25rem 0.8rem; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
th {{ color: var(--soft); font-weight: 600; }}
.js-plotly-plot .main-svg:not(:has(.hoverlayer)) text, .js-plotly-plot .infolayer text,
.js-plotly-plot .cartesianlayer text {{ fill: var(--ink) !important; }}
.js-plotly-plot .gridlayer path {{ stroke: var(--line) !important; }}
.js-plotly-plot .xlines-above, .js-plotly-plot .ylines-above {{ stroke: var(--soft) !important; }}
"""
