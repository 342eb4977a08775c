"""A wish to stop: the first Ctrl-C or SIGTERM asks, a second one interrupts at once."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

SAME_WISH_S = 1.0  # torchrun sends SIGTERM after a Ctrl-C


class StopOnSignal:
    """Within, the first signal sets `is_asked`, so that whoever trains saves and stops after this step; a second one
    raises KeyboardInterrupt. What comes within a second is the same wish.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.is_asked = False
        self._say = say
        self._before: dict[int, Any] = {}
        self._asked_at = 0.0

    def __enter__(self) -> "StopOnSignal":
        """Take the signals, if this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.is_asked:
            if time.monotonic() - self._asked_at > SAME_WISH_S:
                raise KeyboardInterrupt
            return
        self.is_asked, self._asked_at = True, time.monotonic()
        self._say("Stopping after this step; once more to stop at once.")
