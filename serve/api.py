"""The HTTP routes: a request is read and checked here, answered by the engine, and worded as OpenAI's API words it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serve.admin import add_admin
from serve.answers import DONE, Asked, Words, event, model_entry
from serve.api_feedback import Opinions, add_feedback
from serve.asking import Plan, sampling_of, submit_all, turns_of
from serve.description import filled
from serve.engines.contract import Engine, One, Reply
from serve.feedback import Fact, Recent, facts_of, kept_of
from serve.guard import Doors, Guard, answer, read_body
from serve.keys import Key, Keys
from serve.metrics import CONTENT_TYPE, Metrics
from serve.rates import Rates
from serve.reading import read_model, refuse
from serve.refusal import Refusal
from serve.schemas import Chat, Classify, Completion, read_chat, read_completion
from serve.store import Store, StoreError
from serve.tracing import Tracing
from serve.who import label_of, read_who
from toolkit.corpus.talk import Turn

_log = logging.getLogger("maltu.serve")
_SOON = {"retry-after": "10"}


@dataclass(frozen=True)
class Bounds:
    """What the routes allow, and to whom.

    max_tokens: the longest answer that may be asked for. answer_s: how long an answer may take, waiting included.
    rate: how often one owner may ask, as in 60/minute. is_local: answer under a name of this machine alone. is_shared:
    strangers may come in without keys, so nobody is shown everybody's feedback. keeps: conversations are stored.
    folder: where runs are that can be loaded later.
    """

    max_tokens: int
    keys: tuple[Key, ...] = ()
    admin_keys: tuple[Key, ...] = ()
    answer_s: float = 600.0
    rate: str | None = None
    is_local: bool = False
    is_shared: bool = False
    keeps: bool = False
    n_slots: int | None = None
    folder: Path | None = None


class EventStream(StreamingResponse):
    """Server-sent events of replies, which are cancelled when the client leaves, whenever that is.

    over: called once nothing more is sent, or before anything was.
    """

    def __init__(self, replies: Sequence[Reply], events: AsyncIterator[bytes], over: Callable[[], None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._replies, self._over = replies, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._replies)
            self._over()


class Desk:
    """Answers chats and completions. recent: what is known of the last answers, for feedback."""

    def __init__(
        self, engine: Engine, bounds: Bounds, metrics: Metrics, store: Store | None, tracing: Tracing | None = None
    ) -> None:
        self._engine, self._bounds, self._metrics, self._store = engine, bounds, metrics, store
        self._tracing = tracing
        self.recent = Recent()

    async def answer(self, request: Request, asked: Chat | Completion, prompts: Sequence[tuple[Turn, ...]]) -> Response:
        """The answer to a request, whole or streamed. Raises Refusal."""
        who = read_who(asked.model, asked.maltu, self._engine.models())
        state, n, options = request.state, asked.n or 1, asked.maltu
        conversation = options.conversation if options is not None else None
        state.model = label_of(who)
        if n * len(prompts) > 1:
            state.charge(n * len(prompts) - 1)
        sampling = sampling_of(asked, asked.limit, self._engine.served(who), self._bounds.max_tokens)
        may_drop = options is not None and options.truncation == "auto"
        key = state.key.digest if state.key else ""
        given = state.request_id, who, tuple(prompts), sampling, n, asked.n_logprobs, key
        plan = Plan(*given, may_drop, asked.form)
        watch = self._metrics.watch(state.model)
        replies, n_dropped = await submit_all(self._engine, plan)
        words = Words(self._head(state.request_id, asked, n_dropped), replies, len(prompts))
        facts = facts_of(words.response_id, state.key.name if state.key else "", plan, replies)
        self.recent.add(facts)
        late = asyncio.get_running_loop().call_later(self._bounds.answer_s, words.give_up, self._bounds.answer_s)

        def over() -> None:
            late.cancel()
            self._count(request, words)
            if self._tracing is not None:
                self._tracing.note(state.request_id, replies, words.n_tokens)

        if asked.stream:
            events = self._keeping(words.events(watch.piece), words, facts, plan, conversation)
            return EventStream(replies, events, over)
        async with _until_hangup(request, replies):
            try:
                whole = await words.whole(watch.piece)
            finally:
                over()
        await self._keep(words, facts, plan, conversation)
        return JSONResponse(whole)

    def _head(self, request_id: str, asked: Chat | Completion, n_dropped: int) -> Asked:
        unused = asked.unused
        if asked.maltu is not None and asked.maltu.conversation is not None and not self._keeps:
            unused = [*unused, "maltu.conversation"]
        return Asked(
            request_id,
            "chat" if isinstance(asked, Chat) else "text",
            int(time.time()),
            unused,
            asked.n_logprobs is not None,
            asked.includes_usage,
            n_dropped,
        )

    @property
    def _keeps(self) -> bool:
        return self._store is not None and self._bounds.keeps

    async def _keeping(
        self, events: AsyncIterator[bytes], words: Words, facts: list[Fact], plan: Plan, conversation: str | None
    ) -> AsyncIterator[bytes]:
        """The events; what was said is kept before the client hears that all is done."""
        async for one in events:
            if one is DONE:
                try:
                    await self._keep(words, facts, plan, conversation)
                except StoreError as error:
                    words.failure = _unstored(error)
                    yield event(words.failure.body())
                    return
            yield one

    async def _keep(self, words: Words, facts: list[Fact], plan: Plan, conversation: str | None) -> None:
        if self._store is None or not self._keeps:
            return
        kept = []
        for fact, text in zip(facts, words.texts, strict=True):
            turns = [{"role": turn.role, "content": turn.content} for turn in plan.prompts[fact.choice // plan.n]]
            kept.append(kept_of(fact, turns, text, conversation))
        await run_in_threadpool(self._store.keep, kept)

    def _count(self, request: Request, words: Words) -> None:
        self._metrics.tokens(request.state.model, *words.n_tokens)
        if words.failure is not None:
            status = words.failure.status
            request.state.outcome = "unavailable" if status == 503 else "refused" if status < 500 else "failed"
        elif not words.is_over:
            request.state.outcome = "gone"


def create_app(
    engine: Engine,
    bounds: Bounds,
    has_page: bool = False,
    store: Store | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The API over an engine, behind the guard. `has_page`: leave the chat page's routes to whoever mounts it.

    tracing: where spans go, None for nowhere.
    """
    app = FastAPI(title="Maltu", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    metrics = Metrics(engine, bounds.n_slots)
    doors = Doors(Keys(bounds.keys), Keys(bounds.admin_keys), Rates(bounds.rate), bounds.is_local, has_page)
    count = metrics.count if tracing is None else tracing.counting(metrics.count)
    app.add_middleware(Guard, doors=doors, is_over=lambda: engine.load().state == "stopped", count=count)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(StoreError, _no_store)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(RequestValidationError, _bad_query)
    desk = Desk(engine, bounds, metrics, store, tracing)
    _add_answers(app, desk, bounds.max_tokens)
    _add_classify(app, engine)
    _add_models(app, engine)
    _add_health(app, engine, metrics)
    add_feedback(app, Opinions(store, desk.recent, metrics, bounds.is_shared))
    add_admin(app, engine, store, metrics, bounds.folder)
    plain = app.openapi
    app.openapi = lambda: filled(plain())  # type: ignore[method-assign]
    return app


def describe_api() -> dict[str, Any]:
    """The description of the API, of no engine in particular: docs/openapi.json."""
    nobody = cast(Engine, None)  # the routes ask an engine only when they are asked themselves
    return dict(create_app(nobody, Bounds(max_tokens=1)).openapi())


def _add_answers(app: FastAPI, desk: Desk, max_tokens: int) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        """An answer to a conversation, whole or streamed."""
        asked = read_chat(await read_body(request), max_tokens)
        return await desk.answer(request, asked, [turns_of(asked.messages)])

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        """Running text that goes on from a prompt, whole or streamed."""
        asked = read_completion(await read_body(request), max_tokens)
        return await desk.answer(request, asked, [(Turn("text", prompt),) for prompt in asked.prompt])


def _add_classify(app: FastAPI, engine: Engine) -> None:
    @app.post("/v1/classify", response_model=None)
    async def classify(request: Request) -> Response:
        """The label of each text, and the probability of every label."""
        asked = read_model(Classify, await read_body(request))
        who, state = read_who(asked.model, None, engine.models()), request.state
        state.model = label_of(who)
        if len(asked.input) > 1:
            state.charge(len(asked.input) - 1)
        key = state.key.digest if state.key else ""
        served, found = await engine.classify(who, asked.input, asked.labels, key)
        data = [
            {"index": place, "label": max(of, key=of.__getitem__), "probabilities": dict(of)}
            for place, of in enumerate(found)
        ]
        maltu = {"adapter": served.adapter, "weights_hash": served.weights_hash}
        head = {"id": f"classify-{state.request_id}", "object": "list", "created": int(time.time())}
        return JSONResponse(head | {"model": served.name, "data": data, "maltu": maltu})


def _add_models(app: FastAPI, engine: Engine) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names that `model` accepts."""
        state = engine.load().state
        entries = [model_entry(served, state, is_int8=engine.is_int8) for served in engine.models().values()]
        return {"object": "list", "data": entries}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them, or what a mixture of them would be."""
        who, served = read_who(name, None, engine.models()), engine.models()
        found = served[who.name] if isinstance(who, One) else engine.served(who)
        return model_entry(found, engine.load().state, is_int8=engine.is_int8)


def _add_health(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process answers at all."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Whether requests are taken in: 503 while the server stops, or fails at everything. Failures are counted."""
        load = engine.load()
        said = {
            "status": load.state,
            "running": load.n_running,
            "waiting": load.n_waiting,
            "failures": load.n_failures,
        }
        return JSONResponse(said, 200 if load.state == "ready" else 503)

    @app.get("/metrics", response_model=None)
    async def numbers() -> Response:
        """Counts and times, for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)


@contextlib.asynccontextmanager
async def _until_hangup(request: Request, replies: Sequence[Reply]) -> AsyncIterator[None]:
    """Inside, a client that leaves cancels the replies; afterwards they are cancelled anyway."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        _cancel(replies)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        _cancel(replies)


def _cancel(replies: Sequence[Reply]) -> None:
    for reply in replies:
        reply.cancel()


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return answer(refusal)


def _unstored(error: StoreError) -> Refusal:
    """The database's own words are for the log, not for clients."""
    _log.error("nothing could be stored: %s", error)
    return Refusal(503, "What was sent could not be stored. Try again later.", "store_unavailable", headers=_SOON)


async def _no_store(request: Request, error: Exception) -> Response:
    assert isinstance(error, StoreError)
    return answer(_unstored(error))


async def _bad_query(request: Request, error: Exception) -> Response:
    """What FastAPI would answer with 422, in OpenAI's shape."""
    assert isinstance(error, RequestValidationError)
    try:
        refuse(error.errors(), n_outer=1)
    except Refusal as refusal:
        return answer(refusal)


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    says = f"{request.method} {request.url.path[:200]!r}: {error.detail}."
    headers = dict(error.headers or {})
    return answer(Refusal(error.status_code, says, error.detail.lower().replace(" ", "_"), headers=headers))
