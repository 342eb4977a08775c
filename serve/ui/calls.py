"""The page as a client of the API: what it asks, and what it hears. Nothing here knows Gradio."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from serve.names import AUTO, MIX
from serve.ui.texts import Trouble

_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
_MOST_SHOWN = 500  # pieces of feedback that one request gives


@dataclass(frozen=True)
class Visitor:
    """Whose request it is: the key that the visitor brought, and the id of what is said in this tab."""

    key: str | None
    conversation: str

    @property
    def owned(self) -> dict[str, str]:
        """What the API takes as the visitor's own: everything of the key, without one this tab's alone."""
        return {} if self.key else {"conversation": self.conversation}


@dataclass(frozen=True)
class Wish:
    """What the controls say: who answers, and how. weights: of a mixture; sampling: fields of the request."""

    model: str
    visitor: Visitor
    weights: Mapping[str, float] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def body(self, talk: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """The request's body. Raises Trouble for a mixture of nobody."""
        own: dict[str, Any] = {"truncation": "auto", "conversation": self.visitor.conversation}
        if self.model == MIX:
            own["mix"] = {name: weight for name, weight in self.weights.items() if weight > 0}
            if not own["mix"]:
                raise Trouble("", "no_weight")
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in talk]
        return {"model": self.model, "messages": messages, "stream": True, "maltu": own, **self.sampling}


@dataclass(frozen=True)
class Heard:
    """An answer so far: its words, its id, who gives it (with weights, where several do), and turns left out."""

    content: str = ""
    id: str | None = None
    model: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    n_dropped: int = 0

    def said(self) -> dict[str, Any]:
        """As feedback names an answer."""
        return {"content": self.content, "response_id": self.id, "model": self.model}


class Caller:
    """Talks to the API at an address. Every method raises Trouble."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def models(self, visitor: Visitor) -> dict[str, Any]:
        """What every name that answers is like, the base last, then `auto` and `mix` where they have a meaning."""
        entries = (await self._json("GET", "/v1/models", visitor))["data"]
        entries.sort(key=lambda entry: entry["maltu"]["kind"] == "base")
        found = {entry["id"]: entry["maltu"] for entry in entries}
        try:
            found[AUTO] = (await self._json("GET", f"/v1/models/{AUTO}", visitor))["maltu"] | {"kind": AUTO}
        except Trouble as trouble:
            if trouble.code == "unreachable":
                raise
        return found | ({MIX: {"kind": MIX}} if len(members_of(found)) > 1 else {})

    async def stream(self, talk: Sequence[Mapping[str, str]], wish: Wish) -> AsyncIterator[Heard]:
        """The next answer as it grows; the last one is the whole of it."""
        heard, is_over = Heard(), False
        try:
            async with (
                self._client(wish.visitor) as client,
                client.stream("POST", "/v1/chat/completions", json=wish.body(talk)) as response,
            ):
                await _check(response)
                async for line in response.aiter_lines():
                    is_over = is_over or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        heard = _more(heard, json.loads(line.removeprefix("data: ")))
                        yield heard
        except httpx.HTTPError:
            raise Trouble("", "broken_off" if heard.id else "unreachable") from None
        if not is_over:
            raise Trouble("", "broken_off")

    async def judge(self, visitor: Visitor, feedback: Mapping[str, Any]) -> None:
        """Store a thumb, a pair or a correction."""
        body = dict(feedback) | {"conversation": visitor.conversation}
        await self._json("POST", "/v1/feedback", visitor, json=body)

    async def stored(self, visitor: Visitor) -> list[dict[str, Any]]:
        """All feedback that is the visitor's own, oldest first."""
        found: list[dict[str, Any]] = []
        while True:
            after = {"after": found[-1]["id"]} if found else {}
            params = visitor.owned | after | {"limit": str(_MOST_SHOWN)}
            page = await self._json("GET", "/v1/feedback", visitor, params=params)
            found += page["data"]
            if not page["has_more"]:
                return found

    async def takes_feedback(self, visitor: Visitor) -> bool:
        """Whether the server takes feedback in."""
        try:
            await self._json("GET", "/v1/feedback", visitor, params=visitor.owned | {"limit": "1"})
        except Trouble as trouble:
            if trouble.code == "feedback_off":
                return False
            raise
        return True

    async def forget(self, visitor: Visitor, id: str | None = None) -> None:
        """Delete one piece of the visitor's own feedback, or all of it with what was kept of the talk."""
        if id is not None:
            await self._json("DELETE", f"/v1/feedback/{id}", visitor, params=visitor.owned)
            return
        await self._json("DELETE", "/v1/feedback", visitor, params=visitor.owned or {"all": "true"})

    async def _json(self, method: str, path: str, visitor: Visitor, **more: Any) -> dict[str, Any]:
        try:
            async with self._client(visitor) as client:
                response = await client.request(method, path, **more)
                await _check(response)
                return dict(response.json())
        except httpx.HTTPError:
            raise Trouble("", "unreachable") from None

    def _client(self, visitor: Visitor) -> httpx.AsyncClient:
        key = visitor.key
        if key and not (key.isascii() and key.isprintable()):
            raise Trouble("", "bad_key")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(base_url=self._address, headers=headers, timeout=_TIMEOUT, trust_env=False)


def members_of(models: Mapping[str, Any]) -> list[str]:
    """The names that can be weighed in a mixture: all that answer by themselves."""
    return [name for name, of in models.items() if of["kind"] in ("run", "expert", "base") and not of.get("routing")]


async def _check(response: httpx.Response) -> None:
    """Raises Trouble for a response that is an error."""
    if response.is_success:
        return
    await response.aread()
    try:
        error = response.json()["error"]
        raise Trouble(error["message"], error.get("code"))
    except (ValueError, KeyError, TypeError):
        raise Trouble(f"HTTP {response.status_code}") from None


def _more(heard: Heard, event: Mapping[str, Any]) -> Heard:
    """What is heard after one more event. Raises Trouble for one that is an error."""
    if "error" in event:
        raise Trouble(event["error"]["message"], event["error"].get("code"))
    told = event.get("maltu") or {}
    piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    routing = told.get("routing") or {}
    return replace(
        heard,
        content=heard.content + piece,
        id=event["id"],
        model=event["model"],
        weights=routing.get("weights") or heard.weights,
        n_dropped=told.get("dropped_turns", heard.n_dropped),
    )
