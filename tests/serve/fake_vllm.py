"""A vLLM server as far as its HTTP goes, in a thread: the routes that are spoken to, with its own bounds and words.

A token is a function of model, prompt, seed and place, never of time. `away` has every route refuse; `restart` forgets
adapters; `breaks` says how the next answers break. What was asked stands in `bodies`.
"""

import asyncio
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.engines.vllm_runs import Handed, describe_runs
from toolkit.bundle import open_run
from toolkit.shipped import shipped

Break = Literal["status", "event", "cut", "foreign"]


class Asked(BaseModel):
    """What vLLM takes at /v1/completions, as far as it is used; the real server overlooks unknown names."""

    model_config = ConfigDict(extra="forbid")

    model: str
    prompt: list[int] = Field(min_length=1)
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, gt=0.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    request_id: str = ""
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None


@dataclass
class FakeVllm:
    """See the head of this file. pace_s: seconds before each token; root: where its base comes from."""

    root: str
    n_vocabulary: int
    context: int = 512
    key: str | None = None
    takes_loras: bool = True
    pace_s: float = 0.003
    loras: dict[str, str] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)
    text: list[int] | None = None  # what it says, where that matters
    n_cut_off: int = 0
    is_away: bool = False
    url: str = ""

    def app(self) -> Starlette:
        routes = [Route("/health", self.health), Route("/v1/models", self.models)]
        routes.append(Route("/v1/completions", self.completions, methods=["POST"]))
        if self.takes_loras:
            routes.append(Route("/v1/load_lora_adapter", self.load, methods=["POST"]))
            routes.append(Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]))
        return Starlette(routes=routes)

    async def health(self, request: Request) -> Response:
        return Response(status_code=503 if self.is_away else 200)

    async def models(self, request: Request) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        base: dict[str, Any] = {"id": "base-here", "root": self.root, "parent": None, "max_model_len": self.context}
        more = [{"id": name, "root": path, "parent": "base-here"} for name, path in self.loras.items()]
        return JSONResponse({"object": "list", "data": [base, *more]})

    async def load(self, request: Request) -> Response:
        asked = await request.json()
        if asked["lora_name"] in self.loras:
            return wrong(f"The lora adapter '{asked['lora_name']}' has already been loaded.", 400)
        config = Path(asked["lora_path"]) / "adapter_config.json"
        if not config.is_file():
            return wrong(f"Loading lora {asked['lora_name']} failed: No adapter found for {asked['lora_path']}", 404)
        if json.loads(config.read_text())["r"] > 16:
            return wrong("LoRA rank 64 is greater than max_lora_rank 16.", 500)
        self.loras[asked["lora_name"]] = asked["lora_path"]
        return PlainTextResponse("Success: LoRA adapter added successfully.")

    async def unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if self.loras.pop(name, None) is None:
            return wrong(f"The lora adapter '{name}' cannot be found.", 404)
        return PlainTextResponse("Success: LoRA adapter removed successfully.")

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.is_away:
            return Response(status_code=503)
        try:
            asked = Asked.model_validate(body)
        except ValidationError as error:
            return wrong(str(error), 400)
        if asked.model != "base-here" and asked.model not in self.loras:
            return wrong(f"The model `{asked.model}` does not exist.", 404)
        if len(asked.prompt) + asked.max_tokens > self.context:
            return wrong(f"This model's maximum context length is {self.context} tokens.", 400)
        broken = self.breaks.pop(0) if self.breaks else None
        if broken == "status":
            return wrong("EngineCore encountered an issue.", 500)
        return StreamingResponse(self.events(asked, broken), media_type="text/event-stream")

    async def events(self, asked: Asked, broken: Break | None) -> AsyncIterator[bytes]:
        is_done = False
        try:
            for place in range(asked.max_tokens):
                await asyncio.sleep(self.pace_s)
                if place == 2 and broken == "event":
                    yield event({"error": {"message": "boom", "type": "InternalServerError", "code": 500}})
                    return
                if place == 2 and broken == "cut":
                    return
                token = self.token(asked, place)
                is_end = token in asked.stop_token_ids
                finish = "stop" if is_end else "length" if place + 1 == asked.max_tokens else None
                choice = {"index": 0, "text": "…", "logprobs": None, "finish_reason": finish, "token_ids": [token]}
                if broken == "foreign":
                    del choice["token_ids"]
                if asked.logprobs is not None:
                    choice["logprobs"] = logprobs(token, asked.logprobs, self.n_vocabulary)
                yield event({"id": "cmpl-x", "object": "text_completion", "choices": [choice]})
                if finish:
                    break
            usage = {"prompt_tokens": len(asked.prompt), "prompt_tokens_details": {"cached_tokens": 3}}
            yield event({"id": "cmpl-x", "choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
            is_done = True
        finally:
            self.n_cut_off += not is_done

    def token(self, asked: Asked, place: int) -> int:
        if self.text is not None:
            return self.text[place] if place < len(self.text) else asked.stop_token_ids[0]
        seed = None if asked.temperature == 0 else asked.seed
        known = json.dumps([asked.model, asked.prompt, seed, place]).encode()
        return int.from_bytes(hashlib.sha256(known).digest()[:4], "big") % self.n_vocabulary


def wrong(message: str, status: int) -> Response:
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)


def event(payload: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(payload)}\n\n".encode()


def logprobs(token: int, n: int, n_vocabulary: int) -> dict[str, Any]:
    """As with return_tokens_as_token_ids: the chosen one first, then the likeliest."""
    top = {f"token_id:{(token + step) % n_vocabulary}": -0.25 - step for step in range(n + 1)}
    return {"tokens": [f"token_id:{token}"], "token_logprobs": [-0.25], "top_logprobs": [top], "text_offset": [0]}


@contextlib.contextmanager
def running(fake: FakeVllm) -> Iterator[FakeVllm]:
    """Serve it on a free port of this machine."""
    config = uvicorn.Config(fake.app(), port=0, log_config=None, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
        assert thread.is_alive()
    fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join()


def described(runs: Path, *names: str) -> dict[str, Handed]:
    """Runs of the shared folder, as the engine is given them."""
    return describe_runs([open_run(runs / name) for name in names or ("casual", "polite")])


def fake_of(runs: Path, **options: Any) -> FakeVllm:
    """A server with the base of these runs."""
    base = described(runs)["base"]
    return FakeVllm(str(shipped("base/spoken-mini")), base.n_vocabulary, **options)
