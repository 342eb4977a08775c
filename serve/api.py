"""The HTTP routes: a request is read and checked here, answered by the engine, and worded as OpenAI's API words it."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serve import names
from serve.answers import Words, model_entry
from serve.engines.contract import Ask, Engine, Reply, Served
from serve.guard import Guard, Keys, answer, read_body
from serve.refusal import Refusal
from serve.schemas import Chat, Message, read_chat
from toolkit.corpus.talk import Turn
from toolkit.generate import Sampling


@dataclass(frozen=True)
class Bounds:
    """What the routes allow. max_tokens: the longest answer that may be asked for."""

    max_tokens: int
    keys: tuple[str, ...] = ()


class EventStream(StreamingResponse):
    """Server-sent events of a reply, which is cancelled when the client leaves, whenever that is."""

    def __init__(self, reply: Reply, events: AsyncIterator[bytes]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.cancel()


def create_app(engine: Engine, bounds: Bounds, has_page: bool = False) -> FastAPI:
    """The API over an engine, behind the guard. `has_page`: leave the chat page's routes to whoever mounts it."""
    app = FastAPI(title="Maltu", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.add_middleware(
        Guard, keys=Keys(bounds.keys), has_page=has_page, is_over=lambda: engine.load().state == "stopped"
    )
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    _add_chat(app, engine, bounds)
    _add_models(app, engine)
    _add_health(app, engine)
    return app


def _add_chat(app: FastAPI, engine: Engine, bounds: Bounds) -> None:
    schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": Chat.model_json_schema()}}}}

    @app.post("/v1/chat/completions", openapi_extra=schema)
    async def chat(request: Request) -> Response:
        """An answer to a conversation, whole or streamed."""
        asked = read_chat(await read_body(request), bounds.max_tokens)
        served = engine.models()[names.find(asked.model, engine.models())]
        request_id = request.state.request_id
        turns = tuple(_turn(message) for message in asked.messages)
        reply = await engine.submit(Ask(request_id, served.name, turns, sampling(asked, served, bounds.max_tokens)))
        words = Words(request_id, served, int(time.time()), asked.unused)
        if asked.stream:
            options = asked.stream_options
            return EventStream(reply, words.events(reply, bool(options and options.include_usage)))
        async with _until_hangup(request, reply):
            text = "".join([piece async for piece in reply])
            return JSONResponse(words.completion(text, reply.answer, reply.n_prompt))


def _add_models(app: FastAPI, engine: Engine) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names that `model` accepts."""
        state = engine.load().state
        return {"object": "list", "data": [model_entry(served, state) for served in engine.models().values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return model_entry(engine.models()[names.find(name, engine.models())], engine.load().state)


def _add_health(app: FastAPI, engine: Engine) -> None:
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


def sampling(asked: Chat, served: Served, max_tokens: int) -> Sampling:
    """How tokens are chosen: what the request says, else what the run says; without a seed, a new one each time."""
    own, plain = served.defaults, Sampling()
    top_p = own.get("top_p", plain.top_p) if asked.top_p is None else asked.top_p
    return Sampling(
        temperature=own.get("temperature", plain.temperature) if asked.temperature is None else asked.temperature,
        top_p=max(top_p, 1e-6),  # 0 means the likeliest token alone
        top_k=own.get("top_k", plain.top_k),
        min_p=own.get("min_p", plain.min_p),
        repetition_penalty=own.get("repetition_penalty", plain.repetition_penalty),
        max_tokens=asked.limit or min(own.get("max_tokens", plain.max_tokens), max_tokens),
        stop=tuple(asked.stop or ()),
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
    )


def _turn(message: Message) -> Turn:
    return Turn("system" if message.role == "developer" else message.role, message.content)


@contextlib.asynccontextmanager
async def _until_hangup(request: Request, reply: Reply) -> AsyncIterator[None]:
    """Inside, a client that leaves cancels the reply; afterwards the reply is cancelled anyway."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        reply.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        reply.cancel()


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return answer(refusal)


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    says = f"{request.method} {request.url.path[:200]!r}: {error.detail}."
    headers = dict(error.headers or {})
    return answer(Refusal(error.status_code, says, error.detail.lower().replace(" ", "_"), headers=headers))
