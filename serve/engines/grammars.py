"""Schemas of requests, compiled off the event loop: few at a time, in bounded time, and kept for the next that asks."""

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from serve.refusal import Refusal
from toolkit.grammar import Grammar, GrammarError, Vocabulary, bridge

N_THREADS = 2
N_WAITING = 16
N_KEPT = 32  # of one tokenizer
COMPILE_S = 5.0  # LIMITS keep far below it; what takes longer all the same is refused
_PARAM = "response_format"


@dataclass
class _Known:
    """What was made for one tokenizer: its vocabulary, once it was asked for, and its last schemas."""

    vocabulary: Vocabulary | GrammarError | None = None
    kept: OrderedDict[str, Grammar | GrammarError] = field(default_factory=OrderedDict)


class Grammars:
    """One engine's. A schema that was refused is known as such, and costs nothing the next time. What was made for a
    tokenizer goes with it: a run that is unloaded leaves nothing here.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(N_THREADS, thread_name_prefix="grammar")
        self._known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
        self._lock = threading.Lock()  # guards what is above and the count
        self._bridging = threading.Lock()
        self._n_open = 0

    async def grammar(self, tokenizer: Any, schema: str | None) -> Grammar | None:
        """The schema for this tokenizer; None for none.

        Raises Refusal: 400 for what cannot be followed, is too costly, or is not for this tokenizer; 429 where too many
        are being compiled.
        """
        if schema is None:
            return None
        with self._lock:
            kept = self._of(tokenizer).kept
            found = kept.get(schema)
            if found is not None:
                kept.move_to_end(schema)
        if found is None:
            found = await self._made(tokenizer, schema)
        if isinstance(found, GrammarError):
            raise unfollowed(found)
        return found

    def close(self) -> None:
        """Take nothing in any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _made(self, tokenizer: Any, schema: str) -> Grammar | GrammarError:
        has_begun = threading.Event()
        with self._lock:
            if self._n_open >= N_THREADS + N_WAITING:
                raise _busy()
            self._n_open += 1
        job = self._pool.submit(self._compile, tokenizer, schema, has_begun)
        job.add_done_callback(self._count_off)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job), COMPILE_S)
        except TimeoutError:
            if not has_begun.is_set():
                raise _busy() from None
            return GrammarError(f"the schema took more than {COMPILE_S:g} s to compile. Make it simpler.")

    def _count_off(self, job: Future[Any]) -> None:
        with self._lock:
            self._n_open -= 1

    def _compile(self, tokenizer: Any, schema: str, has_begun: threading.Event) -> Grammar | GrammarError:
        """In a thread of the pool."""
        made: Grammar | GrammarError
        try:
            vocabulary = self._vocabulary(tokenizer)
            has_begun.set()  # the first schema of a base waits for its vocabulary, which is not its fault
            made = Grammar(vocabulary, schema)
        except GrammarError as error:
            made = error
        with self._lock:
            kept = self._of(tokenizer).kept
            kept[schema] = made
            while len(kept) > N_KEPT:
                kept.popitem(last=False)
        return made

    def _vocabulary(self, tokenizer: Any) -> Vocabulary:
        """Made once. Raises GrammarError."""
        with self._lock:
            known = self._of(tokenizer)
        with self._bridging:
            if known.vocabulary is None:
                try:
                    known.vocabulary = bridge(tokenizer)
                except GrammarError as error:
                    known.vocabulary = error
            found = known.vocabulary
        if isinstance(found, GrammarError):
            raise found
        return found

    def _of(self, tokenizer: Any) -> _Known:
        """Under the lock."""
        return self._known.setdefault(tokenizer, _Known())


def unfollowed(error: GrammarError) -> Refusal:
    """Why no answer has the form that was asked for."""
    return Refusal(400, f"{_PARAM}: {error}", "invalid_value", _PARAM)


def _busy() -> Refusal:
    says = "Too many schemas are being compiled. Try again in 2 s."
    return Refusal(429, says, "queue_full", headers={"retry-after": "2"})
