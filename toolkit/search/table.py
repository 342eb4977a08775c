"""A search as people watch it: a live table of the running trials in a terminal, elsewhere a line as each ends."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from toolkit.search.ledger import REASON
from toolkit.search.trials import (
    Counts,
    by_loss,
    count,
    final_loss,
    is_repeated,
    lowest_loss,
    number_of,
    say_shortly,
    say_values,
    short_names,
)

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK = 12  # the last evaluations of a trial, a block each
GAP = 2
WIDTHS = {"trial": 5, "done": 9, "loss": 8, "held-out loss": 13}
AROUND = 5  # lines of the table that are not trials, and the line that the cursor needs
FEW = 0.5  # trials' worth of work before the time left is told


@dataclass(frozen=True)
class Running:
    """A trial that learns now: what it tries, its held-out losses so far, and which share of its steps is done."""

    number: int
    values: Mapping[str, Any]
    losses: Sequence[float]
    done: float
    n_evaluations: int | None = None  # how many there will be, where that is known


class SearchTable:
    """Running trials, best so far, how many ended how, time left. `n_trials` is the budget of the search.

    Within `with`, `show` is called every second or so; it draws only when the table changed. Nothing is left of the
    table at the end. Where the console is no terminal, an ended trial is one line. Quiet: nothing of either.
    """

    def __init__(self, console: Console, n_trials: int, is_quiet: bool = False) -> None:
        self._console, self._n_trials, self._is_quiet = console, n_trials, is_quiet
        self._live: Live | None = None
        self._clock = _Clock()
        self._told: set[int] | None = None
        self._drawn: object = None

    def __enter__(self) -> "SearchTable":
        """Begin to draw."""
        if self._console.is_terminal and not self._console.is_dumb_terminal and not self._is_quiet:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the table away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(
        self, running: Sequence[Running], trials: Sequence[FrozenTrial], seconds_left: float | None = None
    ) -> None:
        """What runs now, and all trials of the study. `seconds_left`: what a time budget leaves, where there is one."""
        if self._is_quiet:
            return
        self._tell_ended(trials)
        if self._live is None:
            return
        counts = count(trials)
        left = self._clock.left(self._n_trials, counts.ended, sum(_share(one) for one in running))
        if seconds_left is not None:
            left = seconds_left if left is None else min(left, seconds_left)
        facts = (tuple(_fingerprint(one) for one in running), counts, _minutes(left), self._console.size)
        if facts != self._drawn:
            self._drawn = facts
            self._live.update(self._table(running, trials, counts, left), refresh=True)

    def say(self, text: str) -> None:
        """A line of text, above the table."""
        self._console.print(Text(text), soft_wrap=self._live is None)  # a line of a log is a line

    def _tell_ended(self, trials: Sequence[FrozenTrial]) -> None:
        """A line for each trial that ended since the last call; in a terminal only for those that failed."""
        ended = [trial for trial in trials if trial.state.is_finished() and not is_repeated(trial)]
        if self._told is None:
            self._told = {trial.number for trial in ended}
            if ended and self._live is None:
                self.say(f"{len(ended)} of {self._n_trials} trials ended before.{_say_best(trials)}")
            return
        for trial in ended:
            if trial.number not in self._told and (self._live is None or trial.state == TrialState.FAIL):
                self.say(_say_ended(trial, by_loss(trials)))
            self._told.add(trial.number)

    def _table(
        self, running: Sequence[Running], trials: Sequence[FrozenTrial], counts: Counts, left: float | None
    ) -> RenderableType:
        room = max(1, self._console.height - AROUND)
        shown = running if len(running) <= room else running[: room - 1]
        table = _rows(shown, self._console.width)
        lines: list[RenderableType] = [_line(self._head(counts, left), "bold"), table]
        if len(shown) < len(running):
            lines.append(_line(f"… and {len(running) - len(shown)} more that learn now", "dim"))
        best = next(iter(by_loss(trials)), None)
        if best is not None:
            lines.append(
                _line(f"best  {final_loss(best):.4f}  trial {best.number}: {say_values(best.params)}", "green")
            )
        return Group(*lines)

    def _head(self, counts: Counts, left: float | None) -> str:
        parts = [f"{counts.ended} of {self._n_trials} trials ended"]
        parts += [f"{counts.pruned} pruned"] if counts.pruned else []
        parts += [f"{counts.failed} failed"] if counts.failed else []
        parts += [_minutes(left)] if left is not None else []
        return " · ".join(parts)


def _rows(shown: Sequence[Running], width: int) -> Table:
    """A row a trial. What they try has a column a parameter where all try the same ones and that fits; else it is
    words in one column, cut where the terminal ends.
    """
    names = list(dict.fromkeys(name for one in shown for name in one.values))
    heads, cells = ["tries"], [[say_values(one.values)] for one in shown]
    if names and all(len(one.values) == len(names) for one in shown):
        apart = [[say_shortly(one.values[name]) for name in names] for one in shown]
        short = list(short_names(names).values())
        needed = sum(max(map(cell_len, column)) + GAP for column in zip(short, *apart, strict=True))
        heads, cells = (short, apart) if needed <= width - sum(WIDTHS.values()) - GAP * len(WIDTHS) else (heads, cells)
    table = Table(box=None, pad_edge=False, expand=True, padding=(0, GAP, 0, 0))
    table.add_column("trial", justify="right", width=WIDTHS["trial"])
    for place, head in enumerate(heads, start=1):
        takes_the_rest = 1 if place == len(heads) else None
        table.add_column(Text(head), ratio=takes_the_rest, no_wrap=True, overflow="ellipsis")
    for name in ("done", "loss", "held-out loss"):
        is_curve = name == "held-out loss"
        table.add_column(name, justify="left" if is_curve else "right", width=WIDTHS[name], no_wrap=True)
    scale = _scale(shown)
    for one, texts in zip(shown, cells, strict=True):
        loss = f"{one.losses[-1]:.4f}" if one.losses else "-"
        curve = Text(sparkline(one.losses, scale), style="cyan")
        table.add_row(str(one.number), *map(Text, texts), _done(one), loss, curve)
    return table


class _Clock:
    """How long the rest takes, from how fast trials ended since the first look."""

    def __init__(self) -> None:
        self._begun: tuple[float, float] | None = None

    def left(self, n_trials: int, n_ended: int, n_underway: float) -> float | None:
        """Seconds left, trials under way counted by their share; None until there is something to judge by."""
        now, work = time.monotonic(), n_ended + n_underway
        if self._begun is None:
            self._begun = now, work
        since, before = self._begun
        if work - before < FEW or now <= since:
            return None
        return max(0.0, n_trials - work) * (now - since) / (work - before)


def sparkline(losses: Sequence[float], scale: tuple[float, float]) -> str:
    """The last losses as blocks, low where the loss is low; `?` for one that is not finite.

    `scale` is the lowest and highest loss of everything that is compared.
    """
    low, high = scale
    top = len(BLOCKS) - 1
    signs = []
    for loss in losses[-SPARK:]:
        share = (loss - low) / (high - low) if high > low else 0.0
        signs.append(BLOCKS[round(min(1.0, max(0.0, share)) * top)] if math.isfinite(loss) else "?")
    return "".join(signs)


def _scale(running: Sequence[Running]) -> tuple[float, float]:
    """The lowest and highest loss of all that is drawn."""
    drawn = [loss for one in running for loss in one.losses[-SPARK:] if math.isfinite(loss)]
    return min(drawn, default=0.0), max(drawn, default=0.0)


def _done(one: Running) -> str:
    """How far a trial came: evaluation k of n, or its share in per cent."""
    if one.n_evaluations is not None:
        return f"{len(one.losses)} of {one.n_evaluations}"
    return f"{100 * _share(one):.0f} %"


def _share(one: Running) -> float:
    return min(1.0, max(0.0, one.done)) if math.isfinite(one.done) else 0.0


def _fingerprint(one: Running) -> tuple[int, int, str]:
    """What has to change before a trial's row does."""
    return one.number, len(one.losses), _done(one)


def _line(text: str, style: str) -> Text:
    """One line that is cut where the terminal ends."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _minutes(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {math.ceil(seconds / 10) * 10} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"


def _say_best(trials: Sequence[FrozenTrial]) -> str:
    best = next(iter(by_loss(trials)), None)
    return "" if best is None else f" The best so far: trial {best.number}, loss {final_loss(best):.4f}."


def _say_ended(trial: FrozenTrial, ordered: Sequence[FrozenTrial]) -> str:
    """The line of an ended trial: number, values, loss or why there is none."""
    what = f"trial {trial.number}: {say_values(trial.params)}"
    loss, lowest = final_loss(trial), lowest_loss(trial)
    if trial.state == TrialState.PRUNED:
        steps, planned = number_of(trial, "steps"), number_of(trial, "steps_planned")
        at = "" if steps is None else f" at step {steps:.0f}" + ("" if planned is None else f" of {planned:.0f}")
        return f"{what}: pruned{at}" + ("" if lowest is None else f", held-out loss {lowest:.4f}")
    if loss is None:
        return f"{what}: failed ({trial.user_attrs.get(REASON) or 'no held-out loss'})"
    best = ordered[0]
    than = "the best so far" if best.number == trial.number else f"best {final_loss(best):.4f}"
    return f"{what}: held-out loss {loss:.4f} ({than})"
