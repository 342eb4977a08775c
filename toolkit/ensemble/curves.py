"""The losses of everybody who learns, in metrics.jsonl and to trackers: `loss/NAME` and `valid_loss/NAME` by NAME's own
step; of a gate `gate/loss` and `gate/valid_loss`.

Members that took the same step share a line, so there are at most as many lines as all their steps together. Whoever
goes on from a checkpoint drops what was written of it beyond, so that a run that was killed has every number once.
Trackers keep what they were told of those steps and are not told it again: the numbers are the same.
"""

from collections.abc import Sequence

from toolkit.bundle import Run
from toolkit.ensemble.experts import Seen
from toolkit.track import Track, drop_numbers, read_metrics
from toolkit.trackers.contract import LOSS_OF, OF_GATE, VALID_LOSS_OF


class Curves:
    """See the head of this file. `track` writes into the run."""

    def __init__(self, run: Run, track: Track) -> None:
        self._run, self._track = run, track
        self._looks: list[tuple[str, int, float]] = []  # that wait for the line of their step
        curves = LOSS_OF, VALID_LOSS_OF, OF_GATE  # the rest was measured at the end, and is measured anew
        drop_numbers(run.path, lambda name, step: name.startswith(curves))
        self._written: dict[str, int] = {}  # by earlier calls: the highest step of each number
        for row in read_metrics(run.path):
            self._written |= {name: max(int(row["step"]), self._written.get(name, 0)) for name in row}

    def begun(self, name: str, step: int) -> None:
        """A member learns from this step on."""
        self._drop((LOSS_OF + name, VALID_LOSS_OF + name), step)

    def looked(self, name: str, step: int, loss: float) -> None:
        """A member was measured after that step."""
        self._looks.append((name, step, loss))

    def stepped(self, seen: Sequence[Seen]) -> None:
        """Members took a step."""
        lines: dict[int, dict[str, float]] = {}
        for one in seen:
            lines.setdefault(one.step, {})[LOSS_OF + one.name] = one.loss
        looks, self._looks = self._looks, []
        for name, step, loss in looks:
            lines.setdefault(step, {})[VALID_LOSS_OF + name] = loss
        for step in sorted(lines):
            self._track.log(step, **lines[step])

    def gate_begun(self, step: int) -> None:
        """The gate learns from this step on."""
        self._drop((f"{OF_GATE}loss", f"{OF_GATE}valid_loss"), step)

    def gate(self, name: str, step: int, value: float) -> None:
        """The gate's `loss` of a step, or its `valid_loss` after it."""
        self._track.log(step, **{OF_GATE + name: value})

    def close(self) -> None:
        """Everybody is done, or stops here."""
        self.stepped(())

    def _drop(self, names: tuple[str, str], step: int) -> None:
        if max(self._written.pop(name, -1) for name in names) > step:
            drop_numbers(self._run.path, lambda name, at: name not in names or at <= step)
