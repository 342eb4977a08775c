"""An engine for one run whose members stand on bases of their own: each is asked in turn, and they vote.

One thread computes, away from the event loop: one label scoring of one member, or the next piece of the one answer that
is being written. Scorings go first, so that none of them waits for an answer to end; answers wait in order. Members of
different tokenizers share no batch, so there are no slots; the rows engine serves everything else.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from serve.engines.bases_panel import Asked, Member, Panel
from serve.engines.contract import Ask, Engine, Load, Reply, Served, Who
from serve.engines.grammars import Grammars, unfollowed
from serve.engines.health import Health
from serve.engines.labelling import wording
from serve.engines.row import Event, Piece, Told
from serve.refusal import Refusal, failed, queue_full, stopping
from toolkit.combine.vote import majority, vote_probabilities
from toolkit.generate import write
from toolkit.grammar import Grammar
from toolkit.writing import Answer, TokenLogprob, Writing

_log = logging.getLogger("maltu.serve.bases")
RETRY_S = 5


class Voting(Told):
    """One answer on its way: each member writes its own, one after another; of several the majority's is given.

    n_prompt: of the first member, whose tokenizer counts. A member draws the noise that it would draw alone.
    """

    def __init__(
        self, ask: Ask, asked: Asked, prompts: Sequence[list[int]], grammars: Sequence[Grammar | None]
    ) -> None:
        super().__init__()
        self.ask, self.asked, self.served = ask, asked, asked.served
        self.n_prompt = len(prompts[0])
        given = zip(asked.members, prompts, grammars, strict=True)
        self.writings = [self._writing(member, prompt, grammar) for member, prompt, grammar in given]
        self.pieces = self._pieces()

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """See Reply."""
        if self._answer is not None:
            return self._answer.logprobs
        return self.writings[0].logprobs[: self._n_logprobs] if len(self.writings) == 1 else ()

    def _writing(self, member: Member, prompt: list[int], grammar: Grammar | None) -> Writing:
        ask, own = self.ask, member.talking()
        limit = max(1, min(ask.sampling.max_tokens, member.served.context - len(prompt)))
        made = Writing(own.base.tokenizer, prompt, ask.sampling, limit, own.ends, ask.row, ask.n_logprobs)
        made.guide = None if grammar is None else grammar.start(own.ends)
        return made

    def _pieces(self) -> Generator[Event | None, None, None]:
        """What can be told, in the engine's thread: None after text that has to wait for the others."""
        is_alone = len(self.writings) == 1
        for member, writing in zip(self.asked.members, self.writings, strict=True):
            with member.opened() as model:
                for text in write(model, writing, lambda: self.is_cancelled):
                    yield Piece(text, len(writing.logprobs)) if is_alone else None
        answers = [writing.answer() for writing in self.writings]
        if is_alone:
            yield answers[0]
            return
        won = majority([answer.text for answer in answers], self.asked.weights)
        winner = self.asked.members[won.member].served.name
        yield Piece(answers[won.member].text, 0)
        yield self.writings[won.member].answer(((winner, won.share),))


class BasesEngine(Engine):
    """See Engine, and the head of this file. n_queue: requests that may wait."""

    def __init__(self, panel: Panel, n_queue: int = 64) -> None:
        self._panel, self._n_queue = panel, n_queue
        self._waiting: deque[Voting] = deque()
        self._scorings: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._now: Voting | None = None
        self._n_coming = self._n_prompt = 0
        self._health = Health()
        self._is_open, self._deadline = True, math.inf
        self._changed = threading.Condition()  # guards everything above
        self._renders, self._grammars = ThreadPoolExecutor(1, thread_name_prefix="render"), Grammars()
        self._worker = threading.Thread(target=self._work, name="bases", daemon=True)
        self._worker.start()

    @property
    def computes(self) -> str:
        """See Engine.computes."""
        return f"one member after another: {self._panel.told()}"

    def models(self) -> Mapping[str, Served]:
        """See Engine.models."""
        return self._panel.models()

    def served(self, who: Who) -> Served:
        """See Engine.served."""
        return self._panel.asked(who).served

    async def submit(self, ask: Ask) -> Reply:
        """See Engine.submit. Raises Refusal beyond that: 400 for members that cannot talk, and for what only one
        tokenizer gives a meaning.
        """
        asked = self._panel.asked(ask.who)
        asked.refuse(ask)
        with self._place():
            prompts = await asyncio.get_running_loop().run_in_executor(self._renders, asked.prompts, ask)
            tokenizers = [member.talking().base.tokenizer for member in asked.members]
            grammars = [await self._grammars.grammar(tokenizer, ask.schema) for tokenizer in tokenizers]
            reply = Voting(ask, asked, prompts, grammars)
            with self._changed:
                if not self._is_open:
                    raise stopping()
                self._waiting.append(reply)
                self._n_prompt += sum(map(len, prompts))
                self._changed.notify()
        return reply

    async def classify(
        self, who: Who, texts: Sequence[str], labels: Sequence[str] | None, key: str = ""
    ) -> tuple[Served, list[Mapping[str, float]]]:
        """See Engine.classify. Text by text and member by member, so that others get their turn in between."""
        asked = self._panel.asked(who)
        words = asked.labels(labels)
        with self._place():
            shown = await asyncio.to_thread(wording, self._panel.run, asked.served.task)
            found: list[Mapping[str, float]] = []
            for text in texts:
                turns = shown.turns(text)
                said = [await self._scored(partial(member.label, turns, words)) for member in asked.members]
                is_one = len(said) == 1
                voted = said if is_one else vote_probabilities([[of] for of in said], asked.how, asked.weights)
                found.append(voted[0])
        return asked.served, found

    def load(self) -> Load:
        """See Engine.load."""
        with self._changed:
            state = self._health.state(is_alive=self._worker.is_alive(), is_open=self._is_open)
            n_waiting = sum(not row.is_cancelled for row in self._waiting) + self._n_coming
            return Load(state, int(self._now is not None), n_waiting, self._health.n_failures, self._n_prompt)

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
    def _place(self) -> Iterator[None]:
        """A place for a request that comes in, or is labelled."""
        with self._changed:
            if not self._is_open:
                raise stopping()
            n_all = sum(not row.is_cancelled for row in self._waiting) + self._n_coming
            if n_all >= self._n_queue + (self._now is None):
                raise queue_full(n_all, RETRY_S)
            self._n_coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._n_coming -= 1

    async def _scored(self, job: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        done: Future[Mapping[str, float]] = Future()
        with self._changed:
            if not self._is_open:
                raise stopping()
            self._scorings.append((done, job))
            self._changed.notify()
        return await asyncio.wrap_future(done)

    # The engine's thread

    def _work(self) -> None:
        """Scorings and pieces, until the engine is closed and empty."""
        while True:
            with self._changed:
                while self._is_open and not (self._scorings or self._waiting or self._now):
                    self._changed.wait()
                left = [row for row in self._waiting if row.is_cancelled]
                for row in left:
                    self._waiting.remove(row)
                scoring = self._scorings.popleft() if self._scorings else None
                if scoring is None and self._now is None and self._waiting:
                    self._now = self._waiting.popleft()
                    self._now.times.begun = time.time_ns()
                is_writing = self._now is not None
                is_over = not (self._is_open or is_writing or scoring)
                is_late = time.monotonic() >= self._deadline
            for row in left:
                _tell(row, row.writings[0].answer())  # cancelled before its first token
            if scoring is not None:
                self._score(*scoring, is_late=is_late)
            elif is_writing:
                self._write(is_late=is_late)
            elif is_over:
                return

    def _score(self, done: Future[Any], job: Callable[[], Any], *, is_late: bool) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            if is_late:
                raise stopping()
            done.set_result(job())
            self._health.went_well()
        except Refusal as refusal:
            done.set_exception(refusal)
        except Exception as error:  # whoever asked for it is told
            self._count_failure()
            done.set_exception(error)

    def _write(self, *, is_late: bool) -> None:
        """The next piece of the present answer."""
        row = self._now
        assert row is not None  # set by the caller
        if is_late:
            self._end(row, stopping())
            return
        try:
            event = next(row.pieces)
        except Exception as error:  # the loop outlives whatever breaks in it
            unfit = next((writing.failure for writing in row.writings if writing.failure is not None), None)
            if unfit is not None:  # of its own schema's making
                self._end(row, unfollowed(unfit))
                return
            _log.error("%s failed", row.ask.id, exc_info=error, extra={"request_id": row.ask.id})
            self._count_failure()
            self._end(row, failed(row.ask.id))
            return
        row.times.first = row.times.first or time.time_ns()
        if isinstance(event, Answer):
            self._health.went_well()
            self._end(row, event)
        elif event is not None:
            _tell(row, event)

    def _end(self, row: Voting, event: Event) -> None:
        with self._changed:
            self._now = None
        row.pieces.close()  # what it had opened
        _tell(row, event)

    def _count_failure(self) -> None:
        with self._changed:
            self._health.failed()


def _tell(row: Voting, event: Event) -> None:
    try:
        row.loop.call_soon_threadsafe(row.put, event)
    except RuntimeError:  # the loop is closed: nobody listens
        row.cancel()
