"""The engine: continuous batching over row slots, requests for any of the server's runs in the same batch.

One thread runs steps: one token for every answer that is written, one chunk of the prompts that are still being read
(serve/scheduler.py says whose), and one token of an answer on a model of its own, for runs that no stack can hold. Rows
join and leave between steps, and so does whatever else needs the models (a router's choice). A step that breaks is
tried again request by request, so that what breaks it fails alone; whatever else breaks fails the answers that run, is
counted in `load`, and the thread goes on.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from serve.engines.batch import Batch
from serve.engines.changing import adapters_of, changed, read
from serve.engines.contract import Ask, Engine, Load, Reply, Served, Who
from serve.engines.forward import AUTO
from serve.engines.grammars import Grammars, unfollowed
from serve.engines.health import Health
from serve.engines.int8 import FLAG
from serve.engines.labelling import label, labeller, labels_of, wording
from serve.engines.models import Model, Parts, share_weights
from serve.engines.reuse import Reuse
from serve.engines.routing import Routing
from serve.engines.row import Event, Row, render
from serve.engines.slots import Slots
from serve.engines.teams import Team, team_of
from serve.refusal import failed, queue_full, stopping
from serve.scheduler import Limits, Scheduler, Step, Ticket
from toolkit.adapters import anatomy
from toolkit.bundle import Run
from toolkit.errors import BaseError
from toolkit.grammar import GrammarError
from toolkit.writing import Answer

_log = logging.getLogger("maltu.serve.rows")
BREATH_S = 0.1  # between a crash and the next step
REUSED_SHARE = 0.25  # of the memory for keys and values, for texts that may begin alike
_T = TypeVar("_T")


class RowsEngine(Engine):
    """See Engine. n_slots: rows that are written side by side; n_queue: requests that may wait for a slot; cache_mb:
    memory for keys and values (one answer always fits), those kept for texts that begin alike counted. forward, int8:
    as Slots takes them. Raises: BaseError where Slots does, and for int8 where a model runs on its own.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        n_slots: int = 32,
        n_queue: int = 64,
        cache_mb: int = 2048,
        *,
        forward: str = AUTO,
        int8: bool = False,
    ) -> None:
        self._models = dict(models)
        stacks = {id(model.stack): model.stack for model in models.values() if model.stack is not None}
        if len(stacks) > 1:
            raise ValueError("the models of one engine share one stack")
        if int8:
            _refuse_lone(models)
        self._slots = next((Slots(stack, forward, int8=int8) for stack in stacks.values()), None)
        for stack in stacks.values():  # slots may have laid the base's weights elsewhere
            for model in models.values():
                if model.stack is None:
                    share_weights(stack.base, model.loaded.model)
        n_kept = int(REUSED_SHARE * cache_mb * 2**20)
        self._scheduler = Scheduler(_limits(self._slots, n_slots, n_queue, cache_mb * 2**20 - n_kept))
        self._batch = Batch(self._slots, Reuse(n_kept), self._end, self._fail)
        self._rows: dict[Ticket, Row] = {}
        self._routing, self._grammars = Routing(), Grammars()
        self._jobs: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._coming: dict[object, Team] = {}
        self._leaving: set[str] = set()  # adapters of the stack that no model has any more
        self._is_open, self._deadline = True, math.inf
        self._health = Health()
        self._changed = threading.Condition()  # guards scheduler, rows, jobs and what is above, but not the batch
        self._renders = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._worker = threading.Thread(target=self._work, name="rows", daemon=True)
        tuned: Future[None] = Future()  # in the thread that steps: threads are slower to wake beside those of another
        self._jobs.append((tuned, (lambda: None) if self._slots is None else self._slots.tune))
        self._worker.start()
        tuned.result()

    @property
    def computes(self) -> str:
        """See Engine.computes."""
        return "" if self._slots is None else self._slots.computes

    @property
    def is_int8(self) -> bool:
        """See Engine.is_int8."""
        return self._slots is not None and self._slots.is_int8

    def models(self) -> Mapping[str, Served]:
        """See Engine.models."""
        return {name: model.served for name, model in self._models.items()}

    def served(self, who: Who) -> Served:
        """See Engine.served."""
        return team_of(self._models, who).served

    async def submit(self, ask: Ask) -> Reply:
        """See Engine.submit. Rendering happens in a thread of its own, one request at a time."""
        with self._place(ask.who) as (place, team):
            if team.kind == "route":
                team = await self._between_steps(self._chosen(place, team, ask))
            prompt = await asyncio.get_running_loop().run_in_executor(self._renders, render, team, ask)
            grammar = await self._grammars.grammar(team.models[0].loaded.base.tokenizer, ask.schema)
            row = Row(ask, team, prompt, grammar)
            with self._changed:
                if not self._is_open:
                    raise stopping()
                self._rows[row.ticket] = row
                self._scheduler.join(row.ticket)
                self._changed.notify()
        return row

    async def classify(
        self, who: Who, texts: Sequence[str], labels: Sequence[str] | None, key: str = ""
    ) -> tuple[Served, list[Mapping[str, float]]]:
        """See Engine.classify. Text by text, so that answers go on in between."""
        with self._place(who) as (_, team):
            who_labels, found = labeller(team), []
            words = labels_of(who_labels, labels)
            shown = await asyncio.to_thread(wording, who_labels.models[0].loaded.run, who_labels.served.task)
            for text in texts:
                asked = [partial(label, model, shown.turns(text), words) for model in who_labels.models]
                found.append(who_labels.voted([await self._between_steps(one) for one in asked]))
            return team.served, found

    async def change(self, add: Run | None, remove: str | None) -> None:
        """See Engine.change."""
        parts = None if add is None else await asyncio.to_thread(read, self._models, add)
        await self._between_steps(lambda: self._change(parts, remove))

    def load(self) -> Load:
        """See Engine.load."""
        with self._changed:
            state = self._health.state(is_alive=self._worker.is_alive(), is_open=self._is_open)
            n_running, n_waiting = len(self._scheduler.running), len(self._scheduler.waiting) + len(self._coming)
            counts = self._batch.counts
            return Load(
                state, n_running, n_waiting, self._health.n_failures, counts.n_prompt, counts.n_reused, counts.n_hits
            )

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
        self._grammars.close()

    @contextmanager
    def _place(self, who: Who) -> Iterator[tuple[object, Team]]:
        """A place for a request that comes in, and who answers it: nobody of them is let go meanwhile."""
        place = object()
        with self._changed:
            team = team_of(self._models, who)
            if not self._is_open:
                raise stopping()
            if self._scheduler.is_full(len(self._coming)):
                n_waiting = len(self._scheduler.waiting) + len(self._coming)
                raise queue_full(n_waiting, self._scheduler.retry_after_s(len(self._coming)))
            self._coming[place] = team
        try:
            yield place, team
        finally:
            with self._changed:
                del self._coming[place]

    def _chosen(self, place: object, team: Team, ask: Ask) -> Callable[[], Team]:
        def choose() -> Team:
            chosen = self._routing.team(self._models, team.models[0], ask)
            with self._changed:
                self._coming[place] = chosen
            return chosen

        return choose

    async def _between_steps(self, job: Callable[[], _T]) -> _T:
        """What the job gives, run in the engine's thread, which alone may use the models."""
        done: Future[_T] = Future()
        with self._changed:
            if not self._is_open:
                raise stopping()
            self._jobs.append((done, job))
            self._changed.notify()
        return await asyncio.wrap_future(done)

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
            if self._leaving:
                self._let_go()
            with self._changed:
                jobs, self._jobs = self._jobs, []
                is_late = time.monotonic() >= self._deadline
                over = [row for row in self._rows.values() if is_late or row.is_cancelled]
                admitted = () if over else self._scheduler.admit()
                if not (over or admitted or jobs):
                    if self._scheduler.running or not self._is_open:
                        return self._scheduler.step() if self._scheduler.running else None
                    self._changed.wait()
                    continue
            self._do(jobs)
            with torch.inference_mode():
                for row in over:
                    if is_late:
                        self._end(row, stopping())
                    else:
                        self._batch.cut_off(row)
                for ticket in admitted:
                    self._batch.enter(self._rows[ticket])
            self._hand_out()

    def _run(self, step: Step) -> None:
        """One step: everybody who writes, then a chunk of reading, then those on models of their own."""
        with torch.inference_mode():
            writing = [self._rows[ticket] for ticket in step.writing]
            reading = [(self._rows[ticket], n_tokens) for ticket, n_tokens in step.reading]
            with nullcontext() if self._slots is None else self._slots.few_threads():
                if self._batch.run(writing, reading):
                    self._health.went_well()
        if step.alone is not None and self._batch.run_alone(self._rows[step.alone]):
            self._health.went_well()

    def _do(self, jobs: Sequence[tuple[Future[Any], Callable[[], Any]]]) -> None:
        for done, job in jobs:
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(job())
            except Exception as error:  # whoever asked for it is told
                done.set_exception(error)

    def _change(self, add: Parts | None, remove: str | None) -> None:
        found = changed(self._models, add, remove)
        with self._changed:
            self._models = found.models
        self._leaving |= set(found.gone)

    def _let_go(self) -> None:
        """Take out of the stack what nobody is answered by any more."""
        with self._changed:
            teams = [*self._coming.values(), *(row.team for row in self._rows.values())]
            models = [*self._models.values(), *(model for team in teams for model in team.models)]
        used = {name for model in models for name in adapters_of(model)}
        if self._slots is not None:
            for name in self._leaving - used:
                self._slots.stack.remove(name)
        self._leaving &= used

    def _fail(self, row: Row, error: Exception) -> None:
        if row.ticket not in self._rows:
            return
        if isinstance(error, GrammarError):  # of its own schema's making
            self._end(row, unfollowed(error))
            return
        _log.error("%s failed", row.ask.id, exc_info=error, extra={"request_id": row.ask.id})
        self._count_failure()
        self._end(row, failed(row.ask.id))

    def _count_failure(self) -> None:
        with self._changed:
            self._health.failed()

    def _end(self, row: Row, event: Event, took_s: float | None = None) -> None:
        """A row is over; its place is free."""
        self._batch.events.append((row, event))
        with self._changed:
            self._rows.pop(row.ticket, None)
            self._scheduler.leave(row.ticket, took_s)
        self._batch.leave(row, keeps=isinstance(event, Answer))

    def _crash(self) -> None:
        """The loop itself broke: what runs has failed, what waits too where it broke again and again; nothing is left
        of it, and the loop starts again.
        """
        _log.exception("the engine broke and starts again")
        self._count_failure()
        with self._changed:
            tickets = list(self._scheduler.running)
            if self._health.is_bad:
                tickets = list(self._rows)
            for ticket in tickets:
                self._scheduler.leave(ticket)
            broken = [self._rows.pop(ticket) for ticket in tickets if ticket in self._rows]
        self._batch.reset()
        for row in broken:
            _log.error("%s failed with it", row.ask.id, extra={"request_id": row.ask.id})
            self._batch.events.append((row, failed(row.ask.id)))
        self._hand_out()
        time.sleep(BREATH_S)

    def _hand_out(self) -> None:
        """Give what happened to the event loops that wait for it, each woken once."""
        events, self._batch.events = self._batch.events, []
        for loop in {row.loop for row, _ in events}:
            own = [(row, event) for row, event in events if row.loop is loop]
            try:
                loop.call_soon_threadsafe(_put_all, own)
            except RuntimeError:  # the loop is closed: nobody listens
                for row, _ in own:
                    row.cancel()


def _limits(slots: Slots | None, n_slots: int, n_queue: int, n_cache: int) -> Limits:
    """How many tokens' keys and values fit into `n_cache` bytes, and how much a step may read on this device."""
    if slots is None:
        return Limits(n_slots, n_queue)
    base = slots.stack.base
    weight: Tensor = anatomy.input_embeddings(base).weight  # type: ignore[assignment]
    n_layers = int(anatomy.text_config(base).num_hidden_layers)
    n_bytes = 2 * n_layers * anatomy.key_value_width(base) * slots.sums.itemsize
    limits = Limits(n_slots, n_queue, max(1, n_cache // n_bytes))
    return limits if weight.device.type == "cpu" else replace(limits, chunk=2048, small_chunk=512)


def _refuse_lone(models: Mapping[str, Model]) -> None:
    """Raise BaseError for models that no stack holds: they answer by modules, in float32."""
    lone = [name for name, model in models.items() if model.stack is None]
    if lone:
        raise BaseError(f"{FLAG}: {', '.join(lone)} cannot share the base's batches here. Serve without it, or apart.")


def _put_all(events: Sequence[tuple[Row, Event]]) -> None:
    for row, event in events:
        row.put(event)
