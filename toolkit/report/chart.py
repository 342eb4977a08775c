"""Small charts as SVG inside HTML: they need no script and no network, and take their colors from the page.

The drawing is stretched to the width of the page while lines keep their width; the words around it are HTML, so that
they stay as large as the text. Every chart has a sentence and a table that say the same.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from markupsafe import Markup

from toolkit.report.markup import EMPTY, folded, joined, table
from toolkit.report.scale import Axis, Bundle, Point, axis_of, thinned, tick_text
from toolkit.report.words import Say, Words

W, H = 1000, 400  # of the drawing's own units; the page decides how large they are
N_COLORS = 6
FEW = 60  # points that are drawn each by itself
ROWS_SHOWN = 30


@dataclass(frozen=True)
class Line:
    """Points under a name. look: `line` (with its spread where there are many points), `dots`, `rings` or `stairs`."""

    name: Say | str
    points: Sequence[Point]
    color: int = 1
    look: Literal["line", "dots", "rings", "stairs"] = "line"
    is_dashed: bool = False


def chart(
    lines: Sequence[Line],
    x_says: Say,
    y_says: Say,
    caption: Words,
    *,
    categories: Sequence[str] = (),
    may_be_log: bool = False,
    is_small: bool = False,
) -> Markup:
    """All lines in one drawing; nothing where they have no points. `categories`: the names of x = 0, 1, 2 ….

    may_be_log: whether the x axis may be logarithmic. Points have to be finite.
    """
    drawn = [(line, thinned(line.points)) for line in lines if line.points]
    if not drawn:
        return EMPTY
    # A step or a rate stands at the edge; a handful of trials gets room.
    is_steps = not categories and all(line.look == "line" for line, _ in drawn)
    xs = [bundle.x for _, bundles in drawn for bundle in bundles]
    x = Axis(-0.5, len(categories) - 0.5) if categories else axis_of(xs, may_be_log=may_be_log, whole=is_steps)
    x = replace(x, is_whole=all(one == int(one) for one in xs))
    y = axis_of([bundle.mean for _, bundles in drawn for bundle in bundles])
    shapes = joined(_shape(line, bundles, x, y) for line, bundles in drawn)
    name = f"c{zlib.crc32(shapes.encode() + str(caption).encode()):x}"
    picture = Markup(
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-labelledby="{}">{}{}</svg>'
    ).format(W, H, name, _grid(y), shapes)
    plot = Markup('<div class="plot{}">{}{}{}</div>').format(
        " small" if is_small else "", picture, _y_words(y), _x_words(x, categories)
    )
    return Markup(
        '<figure class="chart"><div class="axis-y">{}</div>{}<div class="axis-x">{}</div>{}'
        '<figcaption id="{}">{}</figcaption>{}</figure>'
    ).format(y_says, plot, x_says, _legend(drawn), name, caption, _numbers(drawn, x_says, y_says, categories))


def _grid(y: Axis) -> Markup:
    rows = [f"M0 {_y(y, tick)}H{W}" for tick in y.ticks()]
    return Markup('<path class="grid" d="{}"/>').format("".join(rows))


def _y(axis: Axis, value: float) -> float:
    return round(H * (1 - axis.at(value)), 1)


def _x(axis: Axis, value: float) -> float:
    return round(W * axis.at(value), 1)


def _shape(line: Line, bundles: Sequence[Bundle], x: Axis, y: Axis) -> Markup:
    places = [(_x(x, one.x), _y(y, one.mean)) for one in bundles]
    look = f"s{(line.color - 1) % N_COLORS + 1}" + (" dashed" if line.is_dashed else "")
    if line.look in ("dots", "rings"):
        return _marks(line, bundles, places, look)
    parts = []
    if any(one.high > one.low for one in bundles):
        edge = [(_x(x, one.x), _y(y, one.high)) for one in bundles]
        edge += [(_x(x, one.x), _y(y, one.low)) for one in reversed(bundles)]
        parts.append(Markup('<path class="spread {}" d="M{}Z"/>').format(look, _path(edge)))
    drawn = f"M{_path(places)}" if line.look == "line" else _stairs(places)
    parts.append(Markup('<path class="line {}" d="{}"/>').format(look, drawn))
    if len(places) <= FEW and line.look == "line":
        parts.append(_marks(line, bundles, places, look))
    return joined(parts)


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:g} {y:g}" for x, y in places)


def _stairs(places: Sequence[tuple[float, float]]) -> str:
    return f"M{places[0][0]:g} {places[0][1]:g}" + "".join(f"H{x:g}V{y:g}" for x, y in places[1:])


def _marks(line: Line, bundles: Sequence[Bundle], places: Sequence[tuple[float, float]], look: str) -> Markup:
    """A mark a point: a line of no length with round ends, which no stretching makes an ellipse."""
    kind = "ring" if line.look == "rings" else "dot"
    parts = []
    for one, (x, y) in zip(bundles, places, strict=True):
        at = f"M{x:g} {y:g}h0"
        title = f"{tick_text(one.x)}: {one.mean:.4g}"
        parts.append(Markup('<path class="{} {}" d="{}"><title>{}</title></path>').format(kind, look, at, title))
        if line.look == "rings":
            parts.append(Markup('<path class="hole" d="{}"/>').format(at))
    return joined(parts)


def _y_words(y: Axis) -> Markup:
    return joined(
        Markup('<span class="ty" style="top:{}%" aria-hidden="true">{}</span>').format(
            f"{100 * (1 - y.at(tick)):.2f}", tick_text(tick)
        )
        for tick in y.ticks()
    )


def _x_words(x: Axis, categories: Sequence[str]) -> Markup:
    told = [(float(at), name) for at, name in enumerate(categories)] or [(tick, tick_text(tick)) for tick in x.ticks()]
    return joined(
        Markup('<span class="tx" style="left:{}%" aria-hidden="true">{}</span>').format(f"{100 * x.at(at):.2f}", name)
        for at, name in told
    )


def _legend(drawn: Sequence[tuple[Line, Sequence[Bundle]]]) -> Markup:
    if len(drawn) < 2:
        return EMPTY
    keys = (
        Markup('<li><i class="key {} s{}{}"></i>{}</li>').format(
            line.look, (line.color - 1) % N_COLORS + 1, " dashed" if line.is_dashed else "", line.name
        )
        for line, _ in drawn
    )
    return Markup('<ul class="legend">{}</ul>').format(joined(keys))


def _numbers(
    drawn: Sequence[tuple[Line, Sequence[Bundle]]], x_says: Say, y_says: Say, categories: Sequence[str]
) -> Markup:
    """The points as a table, at most ROWS_SHOWN of a line."""
    rows: list[tuple[Words, ...]] = []
    for line, _ in drawn:
        for one in thinned(line.points, ROWS_SHOWN):
            place = categories[int(one.x)] if categories else tick_text(one.x)
            rows.append((place, line.name, f"{one.mean:.4f}"))
    head = (x_says, Say("line", "선"), y_says)
    caption = Say("The same in numbers", "숫자로 보기")
    return folded(caption, table(caption, head, rows, texts=2))
