"""Three learning rates of one candidate, side by side in a stack, for as long as the clock allows."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence

from toolkit.fit.fitted import Fitted
from toolkit.fit.many import Look
from toolkit.fit.member import Learner, Member
from toolkit.stack.adapter import Adapter


class Crew:
    """Keeps the promises of toolkit.fit.many.Crew. `until`: the time (monotonic) at which everybody stops and is
    measured once more; `wants_stop`: asked between passes, ends everything at once.
    """

    def __init__(self, members: Sequence[Member], until: float, wants_stop: Callable[[], bool]) -> None:
        self._coming, self.until, self._wants_stop = list(members), until, wants_stop
        self.stepped_at: list[float] = []
        self.fitted: dict[str, Fitted] = {}
        self.adapters: dict[str, Adapter] = {}
        self.reasons: dict[str, str] = {}

    def next(self) -> Member | None:
        """The next rate."""
        return self._coming.pop(0) if self._coming else None

    def looked(self, looks: Sequence[Look]) -> Collection[str]:
        """Nobody leaves early: a high rate may need its whole schedule."""
        return ()

    def left(self, name: str, fitted: Fitted, adapter: Adapter) -> None:
        """One has learned what it could."""
        self.fitted[name], self.adapters[name] = fitted, adapter

    def failed(self, name: str, fitted: Fitted, reason: str) -> None:
        """One could not go on; the others do."""
        self.fitted[name], self.reasons[name] = fitted, reason

    def alive(self) -> None:
        """Between two forward passes."""

    def stepped(self, learners: Sequence[Learner], losses: Mapping[str, float]) -> bool:
        """Time is looked at after every step."""
        self.stepped_at.append(time.monotonic())
        if self.stepped_at[-1] >= self.until:
            for learner in learners:
                learner.end_here()
        return self._wants_stop()

    def best(self) -> str | None:
        """The name of the one with the lowest held-out loss; None where all failed."""
        found = {name: of.best_loss for name, of in self.fitted.items() if name in self.adapters}
        return min(found, key=lambda name: (found[name] is None, found[name] or 0.0, name)) if found else None
