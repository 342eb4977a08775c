"""Schemas of requests, compiled off the event loop: few at a time, in bounded time, and kept for the next that asks."""

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from serve.refusal import Refusal
from toolkit.grammar import Grammar, GrammarError, Vocabulary, bridge

N_THREADS = 2
N_WAITING = 16
N_KEPT = 32
COMPILE_S = 5.0  # LIMITS keep far below it; what takes longer all the same is refused
_PARAM = "response_format"


class Grammars:
    """One engine's. A schema that was refused is known as such, and costs nothing the next time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(N_THREADS, thread_name_prefix="grammar")
        self._kept: OrderedDict[tuple[int, str], Grammar | GrammarError] = OrderedDict()
        self._vocabularies: dict[int, tuple[Any, Vocabulary | GrammarError]] = {}
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
        key = id(tokenizer), schema
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
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
            self._kept[id(tokenizer), schema] = made
            while len(self._kept) > N_KEPT:
                self._kept.popitem(last=False)
        return made

    def _vocabulary(self, tokenizer: Any) -> Vocabulary:
        """Made once; the tokenizer is kept with it, so that no other one takes its id. Raises GrammarError."""
        with self._bridging:
            if id(tokenizer) not in self._vocabularies:
                try:
                    self._vocabularies[id(tokenizer)] = tokenizer, bridge(tokenizer)
                except GrammarError as error:
                    self._vocabularies[id(tokenizer)] = tokenizer, error
            found = self._vocabularies[id(tokenizer)][1]
        if isinstance(found, GrammarError):
            raise found
        return found


def unfollowed(error: GrammarError) -> Refusal:
    """Why no answer has the form that was asked for."""
    return Refusal(400, f"{_PARAM}: {error}", "invalid_value", _PARAM)


def _busy() -> Refusal:
    says = "Too many schemas are being compiled. Try again in 2 s."
    return Refusal(429, says, "queue_full", headers={"retry-after": "2"})
