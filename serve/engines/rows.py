"""The engine: continuous batching over row slots, requests for any of the server's runs in the same batch.

One thread runs steps: one token for every answer that is written, one chunk of the prompts that are still being read
(serve/scheduler.py says whose), and one token of an answer on a model of its own, for runs that no stack can hold. Rows
join and leave between steps. A step that breaks is tried again row by row, so that what breaks it fails alone; whatever
else breaks fails the answers that run, is counted in `load`, and the thread goes on.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from serve.engines.contract import Ask, Engine, Load, Reply, Served, State
from serve.engines.models import Model
from serve.engines.row import Row, render
from serve.engines.slots import Seat, Slots
from serve.engines.writing import next_tokens
from serve.refusal import Refusal, failed, queue_full, stopping
from serve.scheduler import Limits, Scheduler, Step, Ticket
from toolkit.adapters import anatomy
from toolkit.generate import Answer

_log = logging.getLogger("maltu.serve.rows")
MANY_FAILURES = 3  # answers in a row that failed; for FAILING_S the engine then says so
FAILING_S = 30.0
BREATH_S = 0.1  # between a crash and the next step


class RowsEngine(Engine):
    """See Engine. n_slots: answers that run side by side; n_queue: requests that may wait for a slot; cache_mb: memory
    for keys and values (one answer always fits).
    """

    def __init__(self, models: Mapping[str, Model], n_slots: int = 32, n_queue: int = 64, cache_mb: int = 2048) -> None:
        self._models = dict(models)
        stacks = {id(model.stack): model.stack for model in models.values() if model.stack is not None}
        if len(stacks) > 1:
            raise ValueError("the models of one engine share one stack")
        self._slots = next((Slots(stack) for stack in stacks.values()), None)
        self._scheduler = Scheduler(_limits(self._slots, n_slots, n_queue, cache_mb))
        self._rows: dict[Ticket, Row] = {}
        self._n_rendering = 0
        self._is_open, self._deadline = True, math.inf
        self._n_failures = self._n_in_a_row = 0
        self._failed_at = -math.inf
        self._events: list[tuple[Row, str | Answer | Refusal]] = []  # of the step that runs
        self._changed = threading.Condition()  # guards scheduler, rows and what is above, but not slots and events
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
            prompt = await asyncio.get_running_loop().run_in_executor(self._renders, render, model, ask)
            row = Row(ask, model, prompt)
        finally:
            with self._changed:
                self._n_rendering -= 1
        with self._changed:
            if not self._is_open:
                raise stopping()
            self._rows[row.ticket] = row
            self._scheduler.join(row.ticket)
            self._changed.notify()
        return row

    def load(self) -> Load:
        """See Engine.load."""
        with self._changed:
            is_failing = self._n_in_a_row >= MANY_FAILURES and time.monotonic() - self._failed_at < FAILING_S
            state: State = "failing" if is_failing else "ready"
            if not self._worker.is_alive():
                state = "stopped"
            elif not self._is_open:
                state = "draining"
            n_running, n_waiting = len(self._scheduler.running), len(self._scheduler.waiting) + self._n_rendering
            return Load(state, n_running, n_waiting, self._n_failures)

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
            if self._scheduler.is_full(self._n_rendering):
                n_waiting = len(self._scheduler.waiting) + self._n_rendering
                raise queue_full(n_waiting, self._scheduler.retry_after_s(self._n_rendering))
            self._n_rendering += 1

    # The engine's thread

    def _work(self) -> None:
        """Steps, until the engine is closed and empty; a crash fails what runs, and the steps go on."""
        while True:
            try:
                while (step := self._next_step()) is not None:
                    self._run(step)
                    self._hand_out()
                return
            except Exception:  # the loop outlives whatever breaks in it
                self._crash()

    def _next_step(self) -> Step | None:
        """What to run now; sleeps while there is nothing. None when there will be nothing any more."""
        while True:
            with self._changed:
                over = [row for row in self._rows.values() if row.is_cancelled]
                is_late = time.monotonic() >= self._deadline
                if is_late:
                    over = list(self._rows.values())
                if not over:
                    self._scheduler.admit()
                    if self._scheduler.running or not self._is_open:
                        return self._scheduler.step() if self._scheduler.running else None
                    self._changed.wait()
                    continue
            for row in over:
                if is_late:
                    self._end(row, stopping())
                else:
                    self._cut_off(row)
            self._hand_out()

    def _run(self, step: Step) -> None:
        """One step: everybody who writes, then a chunk of reading, then those on models of their own."""
        with torch.inference_mode():
            writing = sorted(map(self._rows.__getitem__, step.writing), key=lambda row: _seat(row).slot)
            self._advance(writing, [row.writing.ids[-1:] for row in writing])
            read = [(self._rows[ticket], n_tokens) for ticket, n_tokens in step.reading]
            read = [(row, n_tokens) for row, n_tokens in read if self._has_seat(row)]
            read.sort(key=lambda one: _seat(one[0]).slot)
            chunks = [row.prompt[row.ticket.n_read : row.ticket.n_read + n_tokens] for row, n_tokens in read]
            self._advance([row for row, _ in read], chunks)
        if step.alone is not None:
            self._advance_alone(self._rows[step.alone])

    def _has_seat(self, row: Row) -> bool:
        """Give a row its slot, if it has none yet; False where that fails."""
        if row.seat is None and self._slots is not None:
            try:
                row.seat = self._slots.open(row.model.adapter)
            except Exception as error:  # no memory left
                self._fail(row, error)
        return row.seat is not None

    def _advance(self, rows: Sequence[Row], ids: Sequence[Sequence[int]]) -> None:
        """Give rows their next tokens, and those that have read all their prompt a token of their answer."""
        chunks = dict(zip(rows, map(len, ids), strict=True))
        rows, logits_RV = self._forward(rows, ids)
        told: list[int] = []
        for place, row in enumerate(rows):
            if row.ticket.n_left:
                row.ticket.n_read += chunks[row]
                if row.ticket.n_left:
                    continue
                assert self._slots is not None
                self._slots.settle(_seat(row))
            told.append(place)
        if told:
            own_RV = logits_RV if len(told) == len(rows) else logits_RV[told]
            answering = [rows[place] for place in told]
            for row, token in zip(answering, next_tokens(own_RV, [row.writing for row in answering]), strict=True):
                self._take(row, token)

    def _forward(self, rows: Sequence[Row], ids: Sequence[Sequence[int]]) -> tuple[Sequence[Row], Tensor]:
        """The logits of each row, in one pass; where that breaks, row by row, without those that break alone."""
        if not rows or self._slots is None:
            return [], torch.empty(0)
        try:
            logits_RV = self._slots.forward([_seat(row) for row in rows], ids)
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0], error)
                return [], torch.empty(0)
            _log.warning("a step of %d rows broke (%s): trying each alone", len(rows), error)
            parts = [self._forward([row], [own]) for row, own in zip(rows, ids, strict=True)]
            whole = [(one, logits_1V) for one, logits_1V in parts if one]
            return [row for one, _ in whole for row in one], torch.cat([part for _, part in whole] or [torch.empty(0)])
        self._n_in_a_row = 0
        return rows, logits_RV

    def _take(self, row: Row, token: int | None) -> None:
        """A token is chosen; None: there was nothing to choose from."""
        if token is None:
            says = f"the output of {row.ask.model} is not a number: its training diverged. Train with a lower rate."
            self._fail(row, ArithmeticError(says))
            return
        if piece := row.writing.take(token):
            self._events.append((row, piece))
        if row.writing.finish is not None:
            self._end(row, row.writing.answer(), time.monotonic() - row.since)

    def _advance_alone(self, row: Row) -> None:
        """One token, or a few until a piece of text is certain."""
        if row.pieces is None:
            row.pieces = row.start_alone()
        try:
            self._events.append((row, next(row.pieces)))
            self._n_in_a_row = 0
        except StopIteration as over:
            self._end(row, over.value, time.monotonic() - row.since)
        except Exception as error:  # whatever breaks inside a model must not take the others along
            self._fail(row, error)

    def _cut_off(self, row: Row) -> None:
        """Nobody listens to a row any more: what it has is its answer."""
        if row.pieces is not None:
            while row.ticket in self._rows:
                self._advance_alone(row)  # it sees for itself that it was cancelled
            return
        if piece := row.writing.end("cancelled"):
            self._events.append((row, piece))
        self._end(row, row.writing.answer())

    def _fail(self, row: Row, error: Exception) -> None:
        _log.error("%s failed", row.ask.id, exc_info=error)
        self._count_failure()
        self._end(row, failed(row.ask.id))

    def _count_failure(self) -> None:
        with self._changed:
            self._n_failures += 1
            self._n_in_a_row += 1
            self._failed_at = time.monotonic()

    def _end(self, row: Row, event: Answer | Refusal, took_s: float | None = None) -> None:
        """A row is over; its place is free."""
        self._events.append((row, event))
        with self._changed:
            self._rows.pop(row.ticket, None)
            self._scheduler.leave(row.ticket, took_s)
        if row.pieces is not None:
            row.pieces.close()
        if row.seat is not None and self._slots is not None:
            with torch.inference_mode():
                self._slots.close(row.seat)

    def _crash(self) -> None:
        """The loop itself broke: what runs has failed, what waits too where it broke again and again; nothing is left
        of it, and the loop starts again.
        """
        _log.exception("the engine broke and starts again")
        self._count_failure()
        with self._changed:
            tickets = list(self._scheduler.running)
            if self._n_in_a_row >= MANY_FAILURES:
                tickets = list(self._rows)
            for ticket in tickets:
                self._scheduler.leave(ticket)
            broken = [self._rows.pop(ticket) for ticket in tickets if ticket in self._rows]
        if self._slots is not None:
            self._slots.reset()
        for row in broken:
            _log.error("%s failed with it", row.ask.id)
            self._events.append((row, failed(row.ask.id)))
        self._hand_out()
        time.sleep(BREATH_S)

    def _hand_out(self) -> None:
        """Give what happened to the event loops that wait for it, each woken once."""
        events, self._events = self._events, []
        for loop in {row.loop for row, _ in events}:
            own = [(row, event) for row, event in events if row.loop is loop]
            try:
                loop.call_soon_threadsafe(_put_all, own)
            except RuntimeError:  # the loop is closed: nobody listens
                for row, _ in own:
                    row.cancel()


def _seat(row: Row) -> Seat:
    if row.seat is None:
        raise RuntimeError(f"{row.ask.id} has no seat")
    return row.seat


def _limits(slots: Slots | None, n_slots: int, n_queue: int, cache_mb: int) -> Limits:
    """How many tokens' keys and values fit into the memory given, and how much a step may read on this device."""
    if slots is None:
        return Limits(n_slots, n_queue)
    base = slots.stack.base
    weight: Tensor = anatomy.input_embeddings(base).weight  # type: ignore[assignment]
    n_layers = int(anatomy.text_config(base).num_hidden_layers)
    n_bytes = 2 * n_layers * anatomy.key_value_width(base) * weight.element_size()
    limits = Limits(n_slots, n_queue, max(1, cache_mb * 2**20 // n_bytes))
    return limits if weight.device.type == "cpu" else replace(limits, chunk=2048, small_chunk=512)


def _put_all(events: Sequence[tuple[Row, str | Answer | Refusal]]) -> None:
    for row, event in events:
        row.put(event)
