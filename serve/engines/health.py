"""Whether an engine gets its answers done; /readyz says so."""

import math
import time
from dataclasses import dataclass

from serve.engines.contract import State

MANY_FAILURES = 3  # answers in a row that failed; for FAILING_S the engine then says so
FAILING_S = 30.0


@dataclass
class Health:
    """Failures, counted. Its engine guards it. n_failures: since the start."""

    n_failures: int = 0
    n_in_a_row: int = 0
    failed_at: float = -math.inf

    def failed(self) -> None:
        """An answer failed, or the engine's loop did."""
        self.n_failures += 1
        self.n_in_a_row += 1
        self.failed_at = time.monotonic()

    def went_well(self) -> None:
        """Something came out right."""
        self.n_in_a_row = 0

    @property
    def is_bad(self) -> bool:
        """Whether it failed again and again."""
        return self.n_in_a_row >= MANY_FAILURES

    def state(self, *, is_alive: bool, is_open: bool) -> State:
        """Of an engine whose thread lives, and that takes requests in."""
        if not is_alive:
            return "stopped"
        if not is_open:
            return "draining"
        return "failing" if self.is_bad and time.monotonic() - self.failed_at < FAILING_S else "ready"
