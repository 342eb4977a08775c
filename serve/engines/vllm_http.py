"""What is said to a vLLM server, and what it says: HTTP, and nothing of ours beyond it.

Prompts go as token ids and answers come back as token ids, so that both servers write and read text alike. Needs vLLM
0.10.2 or newer (return_token_ids), started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from toolkit.errors import MaltuError

_PATIENCE = httpx.Timeout(connect=5.0, read=600.0, write=30.0, pool=None)
_QUICK_S = 10.0
_ID = "token_id:"
_DONE = b"[DONE]"
NO_NUMBER = -9999.0  # what vLLM writes for minus infinity


class VllmError(MaltuError):
    """The vLLM server did not do what it was asked. status: its own, None where it cannot be reached."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Catalogue:
    """What a vLLM server has. name, root: what it calls its base, and where that comes from. context: the most tokens
    of prompt and answer, None where it does not say. loras: the adapters that it has."""

    name: str
    root: str
    context: int | None
    loras: frozenset[str]


@dataclass(frozen=True)
class Chosen:
    """A token's log-probability, and the likeliest tokens in its place with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Chunk:
    """New tokens of an answer. logprobs: of each, where they were asked for. finish: why it ended, with its last."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[Chosen, ...] = ()
    finish: str | None = None
    n_cached: int = 0


@dataclass
class VllmHttp:
    """One vLLM server. Used on one event loop. Everything raises VllmError."""

    url: str
    key: str | None = None
    _client: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        """Connections are kept; nothing is sent yet, and the environment's proxies are not asked."""
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=_PATIENCE, limits=unlimited, trust_env=False
        )

    async def close(self) -> None:
        """Let go of all connections."""
        await self._client.aclose()

    async def look(self) -> Catalogue:
        """Whether it is well, and what it has."""
        await self._asked("GET", "/health", _QUICK_S)
        cards = (await self._asked("GET", "/v1/models", _QUICK_S)).get("data") or []
        base = next((card for card in cards if not card.get("parent")), None)
        if base is None:
            raise VllmError(f"{self.url} names no model at /v1/models. It is no vLLM server, or has no model.")
        loras = frozenset(str(card["id"]) for card in cards if card.get("parent"))
        context = base.get("max_model_len")
        name = str(base["id"])
        return Catalogue(name, str(base.get("root") or name), int(context) if context else None, loras)

    async def load(self, lora: str, folder: Path) -> None:
        """Have it read an adapter's folder, which has to lie where it sees it under the same path.

        One that it has already under that name is left alone: names here hold a hash of what they name.
        """
        try:
            await self._asked("POST", "/v1/load_lora_adapter", 120.0, {"lora_name": lora, "lora_path": str(folder)})
        except VllmError as error:
            if error.status == 400 and "already been loaded" in str(error):
                return
            if error.status == 404 and "lora" not in str(error).lower():
                raise VllmError(
                    f"{self.url} takes no adapters while it runs. Start vLLM with --enable-lora, --max-lora-rank of "
                    "your runs, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment.",
                    404,
                ) from None
            raise

    async def unload(self, lora: str) -> None:
        """Have it forget an adapter."""
        await self._asked("POST", "/v1/unload_lora_adapter", _QUICK_S, {"lora_name": lora})

    async def write(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        """The tokens that go on from a prompt, as they come. Leaving the iterator early has vLLM stop."""
        wants_logprobs = body.get("logprobs") is not None
        try:
            async with self._client.stream("POST", "/v1/completions", json=dict(body)) as response:
                if response.status_code != 200:
                    raise _refused(response.status_code, await response.aread())
                async for payload in _events(response):
                    if payload == _DONE:
                        return
                    yield _chunk(json.loads(payload), wants_logprobs)
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise self._away(error) from None
        except (KeyError, TypeError, ValueError) as error:
            raise VllmError(f"{self.url} answered what is no answer of vLLM's ({error!r}).", 200) from None
        raise VllmError(f"{self.url} broke off in the middle of an answer.")

    async def _asked(
        self, method: str, path: str, limit_s: float, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        try:
            response = await self._client.request(method, path, json=body, timeout=limit_s)
        except httpx.HTTPError as error:
            raise self._away(error) from None
        if response.status_code != 200:
            raise _refused(response.status_code, response.content)
        try:
            found = response.json()
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _away(self, error: Exception) -> VllmError:
        return VllmError(f"{self.url} does not answer ({type(error).__name__}: {error}). Is the vLLM server running?")


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of server-sent events, cut at line feeds alone: text holds other signs that end a line elsewhere."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _chunk(event: Mapping[str, Any], wants_logprobs: bool) -> Chunk:
    if "error" in event:
        error = event["error"]
        raise VllmError(f"vLLM: {error.get('message', error)}", int(error.get("code") or 500))
    details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
    n_cached = int(details.get("cached_tokens") or 0)
    if not event["choices"]:
        return Chunk(n_cached=n_cached)
    (choice,) = event["choices"]
    ids = tuple(map(int, choice["token_ids"] or ()))
    found = _logprobs(choice["logprobs"]) if wants_logprobs and ids else ()
    if wants_logprobs and len(found) != len(ids):
        raise ValueError(f"{len(ids)} tokens with {len(found)} log-probabilities")
    return Chunk(ids, found, choice.get("finish_reason"), n_cached)


def _logprobs(told: Mapping[str, Any]) -> tuple[Chosen, ...]:
    """Tokens are named by their ids: several of them may have the same text."""
    found = []
    for logprob, places in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
        top = ((int(name.removeprefix(_ID)), float(value)) for name, value in (places or {}).items())
        likely = tuple(sorted(top, key=lambda one: -one[1]))
        found.append(Chosen(NO_NUMBER if logprob is None else float(logprob), likely))
    return tuple(found)


def _refused(status: int, body: bytes) -> VllmError:
    """An error of vLLM's, in its own words."""
    try:
        told = json.loads(body)
        error = told.get("error", told)
        says = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        says = body[:200].decode("utf-8", "replace")
    return VllmError(f"vLLM: {str(says)[:400]}", status)
