"""The talk of 50 turns as a picture: a plain SVG that is readable on a light and on a dark page.

Above the seconds of every turn, once as it went and once with its history read anew; below how many tokens the history
has, and how many of them the turn had to read.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from machine import say
from serve_report import medians

from toolkit.report.scale import Axis, tick_text

WIDE, LEFT, RIGHT = 760, 62, 20
TOP, HIGH, BETWEEN, BELOW = 76, 190, 62, 44  # of the two panels
TALL = TOP + 2 * HIGH + BETWEEN + BELOW
STYLE = """
  svg { font: 13px system-ui, sans-serif; }
  .ground { fill: #ffffff; } text { fill: #24292f; } .quiet { fill: #57606a; }
  .on { stroke: #ffffff; stroke-width: 4; paint-order: stroke; }
  .grid { stroke: #d0d7de; } .axis { stroke: #8c959f; }
  .a { stroke: #0b62c4; } .a.spread, .a.dot { fill: #0b62c4; } .b { stroke: #b35900; } .b.dot { fill: #b35900; }
  .line { fill: none; stroke-width: 2; } .dashed { stroke-dasharray: 5 4; } .spread { opacity: 0.2; stroke: none; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; } text { fill: #e6edf3; } .quiet { fill: #9198a1; }
    .on { stroke: #0d1117; }
    .grid { stroke: #30363d; } .axis { stroke: #6e7681; }
    .a { stroke: #58a6ff; } .a.spread, .a.dot { fill: #58a6ff; } .b { stroke: #f0a04b; } .b.dot { fill: #f0a04b; }
  }
"""
Place = Callable[[float], float]


def draw(results: dict[str, Any], folder: Path, bases: Sequence[str]) -> None:
    """Write fifty_turns.svg into the folder, of the first of the bases whose talk was measured."""
    found = [name for name in bases if results["cases"].get(f"{name} talk", {}).get("rounds")]
    if not found:
        say("no picture: no talk was measured")
        return
    rounds = results["cases"][f"{found[0]} talk"]["rounds"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fifty_turns.svg"
    path.write_text(picture(found[0], rounds), encoding="utf-8")
    say(f"{path} shows the talk on {found[0]}")


def picture(name: str, rounds: Sequence[dict[str, Any]]) -> str:
    """The whole SVG."""
    turns, anew = medians(list(rounds), "turns"), medians(list(rounds), "anew")
    last = turns[-1]
    x = Axis(0, len(turns) + 0.5)
    seconds = _from_zero([turn["most_s"] for turn in [*turns, *anew]])
    tokens = _from_zero([turn["read"] for turn in turns])
    at_x = _across(x)
    first, second = _upward(seconds, TOP), _upward(tokens, TOP + HIGH + BETWEEN)
    spread = [(t["turn"], t["most_s"]) for t in turns] + [(t["turn"], t["least_s"]) for t in reversed(turns)]
    took = [(turn["turn"], turn["took_s"]) for turn in turns]
    cold = [(turn["turn"], turn["took_s"]) for turn in anew]
    history = [(turn["turn"], turn["read"]) for turn in turns]
    new = [(turn["turn"], turn["read"] - turn["reused"]) for turn in turns]
    head = f"A talk of {len(turns)} short turns on {name}: what a turn costs"
    told = (
        f"Turn {last['turn']:.0f} takes {last['took_s']:.2f} s with a history of {last['read']:.0f} tokens, of which it"
        f" reads {last['read'] - last['reused']:.0f}; turn 2 takes {turns[1]['took_s']:.2f} s."
        f" Medians of {len(rounds)} talks."
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {TALL}" width="{WIDE}" height="{TALL}"'
        f' role="img" aria-labelledby="name said">\n<title id="name">{escape(head)}</title>',
        f'<desc id="said">{escape(told)}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDE}" height="{TALL}" rx="6"/>',
        _text(16, 24, head, 'font-weight="600"'),
        _text(16, 43, told, 'class="quiet" font-size="12"'),
        _frame(at_x, first, x, seconds, "seconds"),
        f'<path class="a spread" d="M{_path(spread, at_x, first)}Z"/>',
        _line("a", took, at_x, first),
        _line("b dashed", cold, at_x, first),
        *_dots("b", cold, at_x, first),
        _key(LEFT + 12, TOP + 14, "a", "the turn as it went (range of the talks)"),
        _key(LEFT + 12, TOP + 32, "b dashed", "the same turn, its history read anew"),
        _frame(at_x, second, x, tokens, "tokens"),
        _line("b dashed", history, at_x, second),
        _line("a", new, at_x, second),
        _key(LEFT + 12, TOP + HIGH + BETWEEN + 14, "b dashed", "history and prompt"),
        _key(LEFT + 12, TOP + HIGH + BETWEEN + 32, "a", "of these, read by this turn"),
        _text((LEFT + WIDE - RIGHT) / 2, TALL - 8, "turn", 'text-anchor="middle"'),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _from_zero(values: Sequence[float]) -> Axis:
    return Axis(0.0, 1.08 * max(values))


def _across(axis: Axis) -> Place:
    return lambda value: round(LEFT + (WIDE - LEFT - RIGHT) * axis.at(value), 1)


def _upward(axis: Axis, top: float) -> Place:
    return lambda value: round(top + HIGH * (1 - axis.at(value)), 1)


def _frame(at_x: Place, at_y: Place, x: Axis, y: Axis, unit: str) -> str:
    """The axes of a panel, with their numbers."""
    ends = f"{at_x(x.low):g}", f"{at_x(x.high):g}"
    parts = [_text(at_x(x.low), at_y(y.high) - 8, unit, 'class="quiet" text-anchor="middle"')]
    for tick in y.ticks():
        kind = "grid" if tick else "axis"
        parts.append(f'<path class="{kind}" d="M{ends[0]} {at_y(tick):g}H{ends[1]}"/>')
        parts.append(_text(at_x(x.low) - 8, at_y(tick) + 4, tick_text(tick), 'text-anchor="end"'))
    last = math.floor(x.high)
    for tick in range(10, last + 1, 10) if last >= 10 else range(1, last + 1):
        parts.append(_text(at_x(tick), at_y(y.low) + 18, tick_text(tick), 'text-anchor="middle"'))
    return "\n".join(parts)


def _path(points: Sequence[tuple[float, float]], at_x: Place, at_y: Place) -> str:
    return "L".join(f"{at_x(x):g} {at_y(y):g}" for x, y in points)


def _line(look: str, points: Sequence[tuple[float, float]], at_x: Place, at_y: Place) -> str:
    return f'<path class="line {look}" d="M{_path(points, at_x, at_y)}"/>' if points else ""


def _dots(look: str, points: Sequence[tuple[float, float]], at_x: Place, at_y: Place) -> list[str]:
    return [f'<circle class="{look} dot" cx="{at_x(x):g}" cy="{at_y(y):g}" r="3.5"/>' for x, y in points]


def _key(x: float, y: float, look: str, says: str) -> str:
    on = 'class="on"'
    return f'<path class="line {look}" d="M{x:g} {y - 4:g}h26"/>\n{_text(x + 34, y, says, on)}'


def _text(x: float, y: float, says: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{" " + more if more else ""}>{escape(says)}</text>'
