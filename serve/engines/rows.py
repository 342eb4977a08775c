"""The first engine: one worker thread, a bounded queue, and every answer that runs gets one token in its turn.

Each answer is a row of its own through toolkit.generate.stream, so what it says does not depend on who else is being
answered, and one that is cancelled stops within a step. At most `n_slots` answers run; a free slot goes to the model
with the fewest running answers, then to the one whose last turn is longest ago, so that no run can shut out another.
"""

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor

from serve.engines.contract import Ask, Engine, Load, Reply, Served
from serve.engines.models import Model
from serve.refusal import Refusal, failed, queue_full, stopping
from toolkit.errors import BaseError, DataError
from toolkit.generate import Answer, stream

_log = logging.getLogger("maltu.serve.rows")
_FIRST_GUESS_S = 2.0  # how long an answer takes, before one was seen


class _Row(Reply):
    """One answer: its events go from the worker thread to the event loop that asked."""

    def __init__(self, ask: Ask, model: Model, prompt: list[int]) -> None:
        self.ask, self.n_prompt = ask, len(prompt)
        self.since = time.monotonic()
        self._cancelled = threading.Event()
        self._answer: Answer | None = None
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Answer | Refusal] = asyncio.Queue()
        self.pieces: Generator[str, None, Answer] = stream(
            model.loaded.model,
            model.loaded.base.tokenizer,
            prompt,
            ask.sampling,
            self._cancelled.is_set,
            model.loaded.ends,
        )

    async def __aiter__(self) -> AsyncIterator[str]:
        """See Reply."""
        while self._answer is None:
            event = await self._events.get()
            if isinstance(event, str):
                yield event
            elif isinstance(event, Refusal):
                raise event
            else:
                self._answer = event

    @property
    def answer(self) -> Answer:
        """See Reply."""
        if self._answer is None:
            raise RuntimeError("the answer is not over yet")
        return self._answer

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody listens any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """See Reply."""
        self._cancelled.set()

    def put(self, event: str | Answer | Refusal) -> None:
        """Hand an event to the event loop; from the worker thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody listens
            self.cancel()


class RowsEngine(Engine):
    """See Engine. n_slots: answers that run side by side; n_queue: requests that may wait for a slot."""

    def __init__(self, models: Mapping[str, Model], n_slots: int = 8, n_queue: int = 64) -> None:
        self._models, self._n_slots, self._n_queue = dict(models), n_slots, n_queue
        self._changed = threading.Condition()  # guards everything below
        self._waiting: list[_Row] = []
        self._running: list[_Row] = []
        self._n_rendering = 0
        self._last_turn = dict.fromkeys(self._models, 0)
        self._n_turns = 0
        self._is_open = True
        self._deadline = math.inf
        self._mean_s = _FIRST_GUESS_S
        self._renders = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._worker = threading.Thread(target=self._work, name="rows", daemon=True)
        self._worker.start()

    def models(self) -> Mapping[str, Served]:
        """See Engine.models."""
        return {name: model.served for name, model in self._models.items()}

    async def submit(self, ask: Ask) -> Reply:
        """See Engine.submit. Rendering happens in a thread of its own, one request at a time."""
        model = self._models[ask.model]
        self._take_place()
        try:
            prompt = await asyncio.get_running_loop().run_in_executor(self._renders, _render, model, ask)
            row = _Row(ask, model, prompt)
        finally:
            with self._changed:
                self._n_rendering -= 1
        with self._changed:
            if not self._is_open:
                raise stopping()
            self._waiting.append(row)
            self._changed.notify()
        return row

    def load(self) -> Load:
        """See Engine.load."""
        with self._changed:
            state = "ready" if self._is_open else "draining" if self._worker.is_alive() else "stopped"
            return Load(state, len(self._running), len(self._waiting) + self._n_rendering)  # type: ignore[arg-type]

    def drain(self, limit_s: float) -> None:
        """See Engine.drain."""
        with self._changed:
            self._is_open = False
            self._deadline = min(self._deadline, time.monotonic() + limit_s)
            self._changed.notify()

    def close(self) -> None:
        """See Engine.close."""
        self.drain(0.0)
        self._worker.join(timeout=10.0)
        self._renders.shutdown(wait=False, cancel_futures=True)

    def _take_place(self) -> None:
        with self._changed:
            if not self._is_open:
                raise stopping()
            n_waiting = len(self._waiting) + self._n_rendering
            if n_waiting + len(self._running) >= self._n_slots + self._n_queue:
                turns = (n_waiting + 1) / self._n_slots
                raise queue_full(n_waiting, min(60, max(1, math.ceil(turns * self._mean_s))))
            self._n_rendering += 1

    def _work(self) -> None:
        """The worker thread: admit, one token for every row, again; over once the engine is closed and empty."""
        while rows := self._next_rows():
            for row in rows:
                self._step(row)

    def _next_rows(self) -> list[_Row]:
        """The rows to step now; sleeps while there are none. Empty when there will be none any more."""
        with self._changed:
            while True:
                self._let_go()
                if time.monotonic() >= self._deadline:
                    self._give_up()
                while self._waiting and len(self._running) < self._n_slots:
                    self._running.append(self._admit())
                if self._running or not self._is_open:
                    return list(self._running)
                self._changed.wait()

    def _let_go(self) -> None:
        """Take out of the queue who waits no longer."""
        for row in [row for row in self._waiting if row.is_cancelled]:
            self._waiting.remove(row)
            row.put(Answer((), "", "cancelled", row.n_prompt))

    def _admit(self) -> _Row:
        """Take the row whose turn it is out of the queue."""
        n_running = Counter(row.ask.model for row in self._running)
        row = min(self._waiting, key=lambda row: (n_running[row.ask.model], self._last_turn[row.ask.model]))
        self._waiting.remove(row)
        self._n_turns += 1
        self._last_turn[row.ask.model] = self._n_turns
        return row

    def _step(self, row: _Row) -> None:
        """One token, or a few until a piece of text is certain."""
        try:
            row.put(next(row.pieces))
        except StopIteration as over:
            self._leave(row)
            row.put(over.value)
        except Exception:  # whatever breaks inside a model must not take the others along
            _log.exception("%s failed", row.ask.id)
            self._leave(row)
            row.put(failed(row.ask.id))

    def _leave(self, row: _Row) -> None:
        with self._changed:
            self._running.remove(row)
            self._mean_s += 0.2 * (time.monotonic() - row.since - self._mean_s)

    def _give_up(self) -> None:
        for row in (*self._running, *self._waiting):
            row.pieces.close()
            row.put(stopping())
        self._running, self._waiting = [], []


def _render(model: Model, ask: Ask) -> list[int]:
    """The prompt's ids. Raises Refusal for turns that the template does not write, and for more than fit."""
    try:
        prompt = model.loaded.renderer.prompt(ask.turns)
    except (DataError, BaseError) as wrong:
        raise Refusal(400, str(wrong), "invalid_value", "messages") from None
    context = model.served.context
    if len(prompt) >= context:
        raise Refusal(
            400,
            f"This model's maximum context length is {context} tokens, the answer included, and these messages have "
            f"{len(prompt)}. Leave out the oldest ones.",
            "context_length_exceeded",
            "messages",
        )
    return prompt
