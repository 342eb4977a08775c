"""The live table of a search: what it shows, that it fits and does not flicker, and its plain lines."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from rich.cells import cell_len
from rich.console import Console

from toolkit.search import table as rooms
from toolkit.search.table import Running, SearchTable, sparkline

LONG = "오늘은 친구처럼 편하게 말해 줘, 그리고 아주 길게 이어지는 [red]문장[/red]"
TRIED = {"train.learning_rate": 0.00341234, "train.batch_size": 4, "adapter.rank": 16}
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen(io.StringIO):
    """A terminal's file that remembers each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)

    def isatty(self) -> bool:
        return True


def terminal(width: int = 80, height: int = 24) -> tuple[Console, Screen]:
    screen = Screen()
    console = Console(file=screen, force_terminal=True, width=width, height=height, legacy_windows=False)
    return console, screen


def plain() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=80), file


def ended(
    number: int,
    loss: float | None,
    state: TrialState = TrialState.COMPLETE,
    rate: float = 0.003,
    **facts: Any,
) -> FrozenTrial:
    trial = optuna.create_trial(
        state=state,
        value=loss,
        params={"train.learning_rate": rate, "train.batch_size": 8},
        distributions={
            "train.learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
            "train.batch_size": CategoricalDistribution([4, 8, 16]),
        },
        user_attrs=facts,
        intermediate_values={} if loss is None else {5: loss},
    )
    trial.number = number
    return trial


def drawn(running: Sequence[Running], trials: Sequence[FrozenTrial] = (), **size: int) -> list[str]:
    """The lines of one frame."""
    console, screen = terminal(**size)
    with SearchTable(console, 16) as table:
        del screen.writes[:]
        table.show(running, trials)
        frame = "".join(screen.writes)
    return [line for line in CONTROL.sub("", frame).replace("\r", "").split("\n") if line.strip()]


def seen(screen: Screen) -> list[str]:
    """What stands on the terminal after everything that was written to it."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", screen.getvalue()):
        if part.startswith("\x1b"):
            row -= int(part[2:-1] or 1) if part.endswith("A") else 0
            lines[row] = "" if part == "\x1b[2K" else lines[row]
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        else:
            column = 0 if part == "\r" else column
            text = "" if part == "\r" else part
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines if line.strip()]


def test_a_row_says_number_values_progress_loss_and_curve() -> None:
    row = drawn([Running(7, TRIED, (3.0, 2.5, 2.0), 0.375, n_evaluations=8)])[2]
    assert row.split() == ["7", "0.003412", "4", "16", "3", "of", "8", "2.0000", "█▅▁"]


def test_values_that_all_trials_have_stand_in_columns() -> None:
    head = drawn([Running(0, TRIED, (), 0.0), Running(1, TRIED, (), 0.0)])[1]
    assert head.split()[:4] == ["trial", "learning_rate", "batch_size", "rank"]


def test_different_values_are_told_in_words() -> None:
    lines = drawn([Running(0, {"adapter.kind": "reft"}, (), 0.0), Running(1, {"lora/rank": 8}, (), 0.25)])
    assert "kind reft" in lines[2] and "rank 8" in lines[3] and "25 %" in lines[3]


def test_values_that_do_not_fit_into_columns_are_told_in_words() -> None:
    lines = drawn([Running(0, {**TRIED, "train.schedule": "cosine"}, (), 0.0)])
    assert "tries" in lines[1] and "learning_rate 0.003412, batch" in lines[2]


@pytest.mark.parametrize("width", [80, 100, 50])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    values = {**TRIED, "adapter.init_text": LONG, "train.schedule": "cosine", "train.optimizer": "adamw"}
    running = [Running(n, values, tuple(4.0 - 0.1 * k for k in range(40)), 0.5, 120) for n in (9, 10, 12345)]
    lines = drawn(running, [ended(0, 2.0), ended(1, 3.0, TrialState.PRUNED)], width=width)
    assert len(lines) == 6
    assert max(map(cell_len, lines)) <= width
    assert all("…" in line for line in lines[2:5])


def test_more_trials_than_lines_are_counted() -> None:
    lines = drawn([Running(n, TRIED, (), 0.0) for n in range(30)], [ended(99, 2.0)], height=12)
    assert len(lines) < 12
    assert "… and 24 more that learn now" in lines


def test_a_value_is_no_markup() -> None:
    assert any("[red]x[/red]" in line for line in drawn([Running(0, {"init_text": "[red]x[/red]"}, (), 0.0)]))


def test_curves_share_one_scale_and_low_is_good() -> None:
    good, bad = drawn([Running(0, TRIED, (4.0, 2.0), 0.1), Running(1, TRIED, (6.0, 4.0), 0.1)])[2:4]
    assert good.split()[-1] == "▅▁" and bad.split()[-1] == "█▅"


@pytest.mark.parametrize(
    ("losses", "shown"), [((), ""), ((2.0,), "▁"), ((1.0, math.nan, 2.0), "▁?█"), ((math.inf, 1.5), "?▅")]
)
def test_a_curve_of_any_losses(losses: tuple[float, ...], shown: str) -> None:
    assert sparkline(losses, (2.0, 2.0) if losses == (2.0,) else (1.0, 2.0)) == shown


def test_only_the_last_losses_are_drawn() -> None:
    lines = drawn([Running(0, TRIED, (99.0, *(3.0 - 0.1 * k for k in range(12))), 0.5)])
    assert lines[2].split()[-1] == "█▇▇▆▅▅▄▄▃▂▂▁"


def test_the_head_counts_how_trials_ended() -> None:
    trials = [ended(0, 2.0), ended(1, 3.0, TrialState.PRUNED), ended(2, None, TrialState.FAIL, reason="nan")]
    trials += [ended(3, None, TrialState.FAIL, reason="lost"), ended(4, None, TrialState.FAIL, reason="twice")]
    lines = drawn([Running(5, TRIED, (), 0.0)], trials)
    assert "3 of 16 trials ended · 1 pruned · 1 failed" in lines
    assert "best  2.0000  trial 0: learning_rate 0.003, batch_size 8" in lines


def test_the_time_left_follows_from_the_work_done(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 160.0])
    monkeypatch.setattr(rooms.time, "monotonic", lambda: next(times))
    clock = rooms._Clock()
    assert clock.left(16, 4, 0.5) is None  # what was done before says nothing about now
    assert clock.left(16, 6, 1.0) == pytest.approx(60.0 / 2.5 * 9.0)


@pytest.mark.parametrize("estimate", [3600.0, None])
def test_a_time_budget_that_ends_sooner_is_what_is_left(
    monkeypatch: pytest.MonkeyPatch, estimate: float | None
) -> None:
    monkeypatch.setattr(rooms._Clock, "left", lambda self, n_trials, n_ended, n_underway: estimate)
    console, screen = terminal()
    with SearchTable(console, 16) as table:
        table.show([Running(0, TRIED, (), 0.0)], [], seconds_left=300.0)
    assert "about 5 min left" in screen.getvalue()


def test_a_frame_is_one_write_and_nothing_is_written_when_nothing_changed() -> None:
    console, screen = terminal()
    with SearchTable(console, 16) as table:
        table.show([Running(0, TRIED, (3.0,), 0.1)], [])
        del screen.writes[:]
        table.show([Running(0, TRIED, (3.0,), 0.1)], [])
        assert screen.writes == []
        table.show([Running(0, TRIED, (3.0, 2.9), 0.2)], [])
        assert len([text for text in screen.writes if text]) == 1


def test_nothing_of_the_table_is_left_at_the_end() -> None:
    console, screen = terminal()
    with SearchTable(console, 16) as table:
        table.show([Running(0, TRIED, (3.0,), 0.1)], [])
        table.show([Running(0, TRIED, (3.0,), 0.1), Running(1, TRIED, (), 0.0)], [ended(2, 2.0)])
    assert seen(screen) == [] and screen.getvalue().rfind("\x1b[?25h") > screen.getvalue().rfind("\x1b[?25l")


def test_a_note_stands_above_the_table() -> None:
    console, screen = terminal()
    with SearchTable(console, 16) as table:
        table.show([Running(0, TRIED, (3.0,), 0.1)], [])
        table.say("[주의] disk is almost full")
        table.show([Running(0, TRIED, (3.0, 2.0), 0.2)], [])
        lines = seen(screen)
    assert lines[:2] == ["[주의] disk is almost full", "0 of 16 trials ended"]
    assert len(lines) == 4 and lines[3].split()[0] == "0"


def test_elsewhere_each_ended_trial_is_one_line() -> None:
    console, file = plain()
    trials = [ended(0, 2.5)]
    with SearchTable(console, 16) as table:
        table.show([], trials)
        trials += [ended(1, 3.0, TrialState.PRUNED, steps=5, steps_planned=20), ended(2, 2.25, rate=0.002)]
        table.show([Running(9, TRIED, (3.0,), 0.1)], trials)
        trials += [ended(3, None, TrialState.FAIL, reason="its loss is nan"), ended(4, 2.4)]
        trials += [ended(5, None, TrialState.FAIL, reason="lost")]
        table.show([], trials)
        table.show([], trials)
    assert file.getvalue().splitlines() == [
        "1 of 16 trials ended before. The best so far: trial 0, loss 2.5000.",
        "trial 1: learning_rate 0.003, batch_size 8: pruned at step 5 of 20, held-out loss 3.0000",
        "trial 2: learning_rate 0.002, batch_size 8: held-out loss 2.2500 (the best so far)",
        "trial 3: learning_rate 0.003, batch_size 8: failed (its loss is nan)",
        "trial 4: learning_rate 0.003, batch_size 8: held-out loss 2.4000 (best 2.2500)",
    ]


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console, screen = terminal()
    with SearchTable(console, 16) as table:
        table.show([Running(0, TRIED, (3.0,), 0.1)], [])
        table.show([], [ended(0, 2.0)])
    assert "\x1b" not in screen.getvalue() and "trial 0:" in screen.getvalue()


def test_a_failed_trial_is_told_above_the_table_too() -> None:
    console, screen = terminal()
    with SearchTable(console, 16) as table:
        table.show([Running(0, TRIED, (3.0,), 0.1)], [])
        table.show([], [ended(0, None, TrialState.FAIL, reason="its loss is nan"), ended(1, 2.0)])
    text = CONTROL.sub("", screen.getvalue())
    assert "trial 0: learning_rate 0.003, batch_size 8: failed (its loss is nan)" in text
    assert "trial 1:" not in text.replace("best  2.0000  trial 1:", "")


def test_quiet_says_nothing() -> None:
    for console, file in (terminal(), plain()):
        with SearchTable(console, 16, is_quiet=True) as table:
            table.show([], [])
            table.show([Running(0, TRIED, (3.0,), 0.1)], [ended(0, 2.0)])
        assert file.getvalue() == ""
