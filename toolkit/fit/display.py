"""Progress as people watch it: one live line in a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0


class Display:
    """Step, loss, tokens per second, time left. `total` in optimizer steps."""

    def __init__(self, console: Console, total: int, is_quiet: bool = False) -> None:
        self._console, self._total, self._is_quiet = console, total, is_quiet
        self._is_live = console.is_terminal and not is_quiet
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  held out {task.fields[valid]}  {task.fields[rate]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._started = time.monotonic()
        self._first: tuple[int, int] | None = None
        self._said_at = 0.0
        self._valid = "-"

    def __enter__(self) -> "Display":
        """Start the clock and, in a terminal, the live line."""
        self._started = time.monotonic()
        if self._is_live:
            self._task = self._progress.add_task("training", total=self._total, loss="-", valid="-", rate="-")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the live line."""
        if self._is_live:
            self._progress.stop()

    def step(self, step: int, loss: float, n_tokens: int) -> None:
        """One optimizer step is done."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step - 1, 0)
        seconds = max(now - self._started, 1e-9)
        rate = n_tokens / seconds
        if self._task is not None:
            self._progress.update(
                self._task, completed=step, loss=f"{loss:.3f}", valid=self._valid, rate=f"{rate:,.0f}"
            )
        elif not self._is_quiet and (now - self._said_at >= PLAIN_EVERY_S or step == self._total):
            self._said_at = now
            left = (self._total - step) * seconds / max(step - self._first[0], 1)
            self._console.print(
                f"step {step}/{self._total}  loss {loss:.3f}  {rate:,.0f} tokens/s  {left:.0f} s left", highlight=False
            )

    def valid(self, step: int, loss: float, best: float) -> None:
        """A held-out loss was measured."""
        self._valid = f"{loss:.3f}"
        if not self._is_live and not self._is_quiet:
            self._console.print(
                f"step {step}/{self._total}  held-out loss {loss:.4f}  best {best:.4f}", highlight=False
            )

    def say(self, text: str) -> None:
        """A line between."""
        self._console.print(text, highlight=False)
