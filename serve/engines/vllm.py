"""The engine that a vLLM server is: it computes, on whatever it runs on; names, prompts, text and bounds stay here.

    python -m serve casual_chat polite --engine vllm --vllm-url http://gpu:8000

A prompt is rendered here, as in training, and sent as token ids; token ids come back and are read here, so that stop
strings, pieces of characters and log-probabilities are those of every other engine. Runs go over as LoRA adapters, each
version under a name of its own. A thread with an event loop of its own talks to the server, looks whether it is well
every LOOK_S seconds, and hands over again what it has lost, after a restart of its own, say. What this engine does not
do: prefix, reft, embedding, DoRA, full; mixtures, votes, routes, gates; labels.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from serve.engines.contract import Ask, Engine, Load, One, Reply, Served, State, Who
from serve.engines.row import prompt_of
from serve.engines.vllm_http import Catalogue, VllmError, VllmHttp
from serve.engines.vllm_reply import VllmReply, body_of
from serve.engines.vllm_runs import Handed, refuse_idle, refuse_other_base, run_on
from serve.names import BASE, is_of
from serve.refusal import Refusal, failed, no_model, queue_full, stopping, unsupported
from toolkit.bundle import Run
from toolkit.errors import AdapterError, InputError, MaltuError, Problem, RunError

_log = logging.getLogger("maltu.serve.vllm")
LOOK_S = 2.0
_RETRY_S = 5
_START_S = 300.0  # for the server to read all adapters


class VllmEngine(Engine):
    """See Engine, and the head of this file. models: as vllm_runs.describe_runs gives them. n_slots: answers that are
    asked of the server side by side; n_queue: requests that may wait for that.

    Raises: InputError where the server cannot be reached, has another base, or does not take the adapters.
    """

    def __init__(
        self, models: Mapping[str, Handed], url: str, key: str | None = None, n_slots: int = 32, n_queue: int = 64
    ) -> None:
        self._models, self._http = dict(models), VllmHttp(url.rstrip("/"), key)
        self._n_slots, self._n_queue = n_slots, n_queue
        self._name = self._root = ""
        self._replies: set[VllmReply] = set()
        self._n_coming = self._n_running = self._n_failures = self._n_prompt = self._n_reused = self._n_hits = 0
        self._is_open, self._is_up = True, True
        self._watching: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._own: set[str] = set()  # adapters that this engine had the server read
        self._joining: set[str | None] = set()  # those that it is reading for a run that is not there yet
        self._lock = threading.Lock()  # guards replies and counts
        self._renders = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._loop = asyncio.new_event_loop()
        self._slots, self._changing, self._poked = asyncio.Semaphore(n_slots), asyncio.Lock(), asyncio.Event()
        self._worker = threading.Thread(target=self._work, name="vllm", daemon=True)
        self._worker.start()
        try:
            asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result(_START_S)
        except (MaltuError, TimeoutError) as error:
            self.close()
            if isinstance(error, InputError):
                raise
            says = str(error) or f"{url} did not take the adapters in {_START_S:g} s."
            raise InputError("--engine vllm", [Problem("--vllm-url", says)]) from None

    def models(self) -> Mapping[str, Served]:
        """See Engine.models."""
        return {name: handed.served for name, handed in self._models.items()}

    def served(self, who: Who) -> Served:
        """See Engine.served; whoever is not one alone is refused."""
        return self._found(who).served

    async def submit(self, ask: Ask) -> Reply:
        """See Engine.submit. Raises Refusal beyond that: 503 where the vLLM server does not answer."""
        handed = self._found(ask.who)
        with self._place():
            given = ask, handed.renderer, handed.n_vocabulary, handed.served.context
            prompt = await asyncio.get_running_loop().run_in_executor(self._renders, prompt_of, *given)
            with self._lock:
                if not self._is_open:
                    raise stopping()
                reply = VllmReply(ask, handed, prompt)
                self._replies.add(reply)
                self._n_prompt += len(prompt)
        self._loop.call_soon_threadsafe(reply.start, self._loop, self._answer(reply))
        return reply

    async def change(self, add: Run | None, remove: str | None) -> None:
        """See Engine.change."""
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._change(add, remove), self._loop))

    def load(self) -> Load:
        """See Engine.load; `failing` means that the vLLM server does not answer."""
        with self._lock:
            state: State = "ready" if self._is_up else "failing"
            if not self._worker.is_alive():
                state = "stopped"
            elif not self._is_open:
                state = "draining"
            n_waiting = len(self._replies) + self._n_coming - self._n_running
            counts = self._n_failures, self._n_prompt, self._n_reused, self._n_hits
            return Load(state, self._n_running, n_waiting, *counts)

    def drain(self, limit_s: float) -> None:
        """See Engine.drain."""
        with self._lock:
            self._is_open = False
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is left
            self._loop.call_soon_threadsafe(self._loop.call_later, limit_s, self._give_up)

    def close(self) -> None:
        """See Engine.close; the server forgets the adapters that it read for this engine."""
        self.drain(0.0)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._begin_to_leave)
        self._worker.join(timeout=10.0)
        self._renders.shutdown(wait=False, cancel_futures=True)

    def _found(self, who: Who) -> Handed:
        if not isinstance(who, One):
            says = f"A vLLM server answers with one adapter at a time, so nobody answers as {str(who)[:200]!r} here."
            raise unsupported("model", says)
        models = self._models
        if who.name not in models:
            raise no_model(who.name, models)
        return models[who.name]

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        with self._lock:
            if not self._is_open:
                raise stopping()
            if not self._is_up:
                raise _away()
            n_all = len(self._replies) + self._n_coming
            if n_all >= self._n_slots + self._n_queue:
                raise queue_full(max(0, n_all - self._n_slots), _RETRY_S)
            self._n_coming += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_coming -= 1

    # The engine's thread

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _connect(self) -> None:
        await self._fit()
        self._watching = self._loop.create_task(self._watch())

    async def _watch(self) -> None:
        """Look after the server for as long as the engine lives."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), LOOK_S)
            self._poked.clear()
            try:
                await self._fit()
                if not self._is_up:
                    _log.warning("the vLLM server answers again")
                self._is_up = True
            except MaltuError as error:
                self._gone(error)
            except Exception:  # whatever breaks here, it is looked at again
                _log.exception("looking after the vLLM server broke")

    async def _fit(self) -> None:
        """See that the server is well, has the runs' base and every adapter. Raises VllmError, InputError."""
        async with self._changing:
            found = await self._http.look()
            self._check(found)
            self._name = found.name
            for handed in self._models.values():
                if handed.lora is not None and handed.lora not in found.loras:
                    await self._hand_over(handed)

    def _check(self, found: Catalogue) -> None:
        base = self._models[BASE]
        if found.root != self._root:
            if wrong := refuse_other_base(found.root, base):
                raise InputError("--engine vllm", [Problem("--vllm-url", wrong)])
            self._root = found.root
        context = min(found.context or base.served.context, base.served.context)
        self._models = {name: _with_context(handed, context) for name, handed in self._models.items()}

    async def _hand_over(self, handed: Handed) -> None:
        assert handed.lora is not None and handed.folder is not None
        try:
            await self._http.load(handed.lora, handed.folder)
        except VllmError as error:
            raise VllmError(f"{handed.served.name}: {error}", error.status) from None
        self._own.add(handed.lora)

    async def _change(self, add: Run | None, remove: str | None) -> None:
        models = self._models
        if remove is not None and (remove == BASE or remove not in models or "/" in remove):
            raise Refusal(404, f"{remove[:80]!r} is no run that is loaded.", "model_not_found", "run")
        if not self._is_open:
            raise stopping()
        try:
            own = await asyncio.to_thread(_described, models[BASE], add) if add is not None else {}
        except (AdapterError, RunError) as error:
            raise Refusal(400, str(error), "run_unfit", "run") from None
        async with self._changing:
            kept = {name: handed for name, handed in self._models.items() if not is_of(name, remove)}
            if twice := kept.keys() & own.keys():
                says = f"{', '.join(sorted(twice))} is loaded already. Reload it instead."
                raise Refusal(409, says, "loaded_already", "run")
            self._joining = {handed.lora for handed in own.values()}
            try:
                for handed in own.values():
                    if handed.lora not in self._own:
                        await self._hand_over(handed)
                self._models = kept | own
            except VllmError as error:
                _log.error("%s was not taken: %s", add.name if add else remove, error)
                raise (Refusal(400, str(error), "run_unfit", "run") if error.status else _away()) from None
            finally:
                self._joining = set()
                await self._forget()

    async def _forget(self) -> None:
        """Have the server let go of what no model and no answer needs any more."""
        with self._lock:
            used = {reply.handed.lora for reply in self._replies}
        used |= self._joining | {handed.lora for handed in self._models.values()}
        for lora in self._own - used:
            self._own.discard(lora)
            with contextlib.suppress(VllmError):  # it is down, or has forgotten already
                await self._http.unload(lora)

    async def _answer(self, reply: VllmReply) -> None:
        """One request, from the first to the last token."""
        reply.has_begun = True
        end: Callable[[], None] = reply.conclude
        try:
            await self._write(reply)
        except asyncio.CancelledError:
            end = reply.cut_off
        except Exception as error:  # whatever breaks, whoever asked hears of it
            end = partial(reply.refuse, self._refusal(reply.ask, error))
        with self._lock:
            self._replies.discard(reply)
        end()
        if self._own - {handed.lora for handed in self._models.values()}:
            await self._forget()

    async def _write(self, reply: VllmReply) -> None:
        """Have the server write. Raises VllmError."""
        async with self._slots:
            self._count(n_running=1)
            reply.times.begun = time.time_ns()
            try:
                async with contextlib.aclosing(self._http.write(body_of(reply, self._name))) as chunks:
                    async for chunk in chunks:
                        reply.take(chunk)
                        if chunk.n_cached:
                            self._count(n_reused=chunk.n_cached)
                        if reply.is_over and chunk.ids and chunk.finish is None:
                            break  # by a stop string, which the server knows nothing of
                reply.end()
            finally:
                self._count(n_running=-1)

    def _count(self, n_running: int = 0, n_reused: int = 0) -> None:
        with self._lock:
            self._n_running += n_running
            self._n_reused += n_reused
            self._n_hits += n_reused > 0

    def _refusal(self, ask: Ask, error: Exception) -> Refusal:
        """An error of the server's in our words."""
        status = error.status if isinstance(error, VllmError) else 500
        if status is None or status in (401, 403, 404, 429, 503):
            _log.error("%s: %s", ask.id, error, extra={"request_id": ask.id})
            if status is None or status == 503:
                self._gone(error)
            self._poked.set()
            return _away()
        if status in (400, 413, 422):
            return Refusal(400, str(error), "invalid_value", None if ask.schema is None else "response_format")
        _log.error("%s failed", ask.id, exc_info=error, extra={"request_id": ask.id})
        with self._lock:
            self._n_failures += 1
        return failed(ask.id)

    def _gone(self, error: Exception) -> None:
        if self._is_up:
            _log.error("the vLLM server does not answer: %s", error)
        self._is_up = False

    def _give_up(self) -> None:
        with self._lock:
            left = list(self._replies)
        for reply in left:
            reply.give_up(stopping())

    def _begin_to_leave(self) -> None:
        if self._leaving is None:
            self._leaving = self._loop.create_task(self._leave())

    async def _leave(self) -> None:
        """End everything, and the loop."""
        if self._watching is not None:
            self._watching.cancel()
        self._give_up()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                while self._replies:
                    await asyncio.sleep(0.01)
                if self._is_up:
                    self._models = {}
                    await self._forget()
                await self._http.close()
        await self._loop.shutdown_asyncgens()
        self._loop.stop()


def _away() -> Refusal:
    says = "The vLLM server behind this one does not answer. Try again later."
    return Refusal(503, says, "engine_unavailable", headers={"retry-after": str(_RETRY_S)})


def _described(base: Handed, run: Run) -> dict[str, Handed]:
    """A run that comes later. Raises RunError, AdapterError."""
    own = run_on(base, run)
    if idle := refuse_idle(run):
        raise RunError(idle)
    return own


def _with_context(handed: Handed, context: int) -> Handed:
    return replace(handed, served=replace(handed.served, context=context)) if context else handed
