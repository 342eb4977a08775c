"""A tracker in a thread of its own: whatever it does there (wait for a network, crash, never come back), the run goes
on. Calls wait in a queue; what the tracker raised is raised where it is called next.
"""

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from toolkit.trackers.contract import Tracker

MOST_WAITING = 10_000  # calls of a tracker that does not keep up
Call = Callable[[Tracker], None]
T = TypeVar("T")


class Apart:
    """Opens a tracker in its thread at once. `end_s`: how long it may take to end."""

    def __init__(self, opened: Callable[[], Tracker], end_s: float) -> None:
        self.end_s = end_s
        self.busy_s = 0.0  # inside the tracker, by the clock
        self.cpu_s = 0.0  # the same, of the processor
        self._opened = opened
        self._waiting: queue.Queue[Call | None] = queue.Queue(MOST_WAITING)
        self._is_open, self._has_ended = threading.Event(), threading.Event()
        self._failed: BaseException | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def wait_open(self, seconds: float) -> bool:
        """Come back once it is open; False: it is still at it, and calls wait. Raises what opening raised."""
        is_open = self._is_open.wait(seconds)
        self._raise()
        return is_open

    def call(self, call: Call) -> None:
        """Let it do something, later. Raises what an earlier call raised, or TimeoutError where it does not keep up."""
        self._raise()
        try:
            self._waiting.put_nowait(call)
        except queue.Full:
            raise TimeoutError(f"{MOST_WAITING:,} calls behind") from None

    def close(self, seconds: float) -> None:
        """Let it do what waits, and end. Raises what it raised, or TimeoutError where it takes longer."""
        self._raise()
        try:
            self._waiting.put(None, timeout=seconds)
        except queue.Full:
            raise TimeoutError(f"did not end within {seconds:g} s") from None
        if not self._has_ended.wait(seconds):
            raise TimeoutError(f"did not end within {seconds:g} s")
        self._raise()

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _work(self) -> None:
        try:
            tracker = self._timed(self._opened)
            self._is_open.set()
            while (call := self._waiting.get()) is not None:
                self._timed(partial(call, tracker))
            self._timed(tracker.close)
        except BaseException as failed:  # a third party's: SystemExit too ends this thread and nothing else
            self._failed = (
                failed if isinstance(failed, Exception) else RuntimeError(f"{type(failed).__name__}: {failed}")
            )
        finally:
            self._is_open.set()
            self._has_ended.set()

    def _timed(self, call: Callable[[], T]) -> T:
        started, cpu = time.perf_counter(), time.thread_time()
        try:
            return call()
        finally:
            self.busy_s += time.perf_counter() - started
            self.cpu_s += time.thread_time() - cpu
