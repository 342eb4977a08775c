"""What stands before every route: the request's id, keys, rates, the bounds of a body, and the page's few own routes.

Every route is closed unless it is named here. Without keys the API's routes are open to whoever reaches the address;
the admin's are never open without an admin key.
"""

import asyncio
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event
from structlog.contextvars import bound_contextvars

from serve.keys import Key, Keys
from serve.rates import Rates
from serve.refusal import Refusal, failed

_log = logging.getLogger("maltu.serve")

MAX_BODY = 2**20
MAX_HEAD = 2**16
BODY_S = 30.0  # how long a body may take to arrive
_GONE = 499  # in the log: the client left before it had sent its request
_LAST_WORDS_S = 0.5  # what the page has to show the end of an answer once the server is over

_OPEN = re.compile(r"/healthz|/readyz")
_API = re.compile(r"/v1/.*|/openapi\.json", re.DOTALL)
_ADMIN = re.compile(r"/admin/.*", re.DOTALL)
_METRICS = "/metrics"
# What the chat page loads and calls. Gradio has more (uploads, files, proxies, developer's tools): they stay shut.
_PAGE = re.compile(
    r"/|/(theme\.css|favicon\.ico|manifest\.json|pwa_icon|robots\.txt|config)/?|/(assets|static|svelte)/[\w./+-]+"
    r"|/gradio_api/(theme\.css|info|app_id|startup-events|cancel|reset|queue/(join|data)|heartbeat/\w+)/?"
)


@dataclass(frozen=True)
class Doors:
    """Who may come in. api and admin: keys; is_local: only under a name of this machine (a page of another site that
    the browser was told lies here is kept out).
    """

    api: Keys
    admin: Keys
    rates: Rates = field(default_factory=Rates)
    is_local: bool = False
    has_page: bool = False


class Guard:
    """The outermost layer of the app. count: told the route, model, outcome and seconds of every request but the
    page's own.
    """

    def __init__(
        self, app: ASGIApp, doors: Doors, is_over: Callable[[], bool], count: Callable[[str, str, str, float], None]
    ) -> None:
        self._app, self._doors, self._is_over, self._count = app, doors, is_over, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, answer it with a refusal, or with 500 and its id when something breaks."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # no route here speaks websocket
            return await send({"type": "websocket.close", "code": 1000})
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, key=None, charge=lambda cost: None)
        with bound_contextvars(request_id=request_id):
            await self._answer(scope, receive, send, request_id)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        since, status = time.monotonic(), 0

        async def send_with_id(event: Event) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
                headers = MutableHeaders(scope=event)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(event)

        try:
            self._check(scope)
            await self._app(scope, self._ending(scope, receive), send_with_id)
        except Refusal as refusal:
            await answer(refusal)(scope, receive, send_with_id)
        except ClientDisconnect:
            status = _GONE
        except Exception:
            _log.exception("%s failed", request_id)
            if status == 0:
                await answer(failed(request_id))(scope, receive, send_with_id)
        if not _PAGE.fullmatch(scope["path"]):
            self._tell(scope, status, time.monotonic() - since)

    def _tell(self, scope: Scope, status: int, took_s: float) -> None:
        """A line in the log, a count in the metrics."""
        state = scope["state"]
        route = str(getattr(scope.get("route"), "path", "other"))
        model, outcome = str(state.get("model", "")), str(state.get("outcome") or _outcome(status))
        key: Key | None = state["key"]
        fields: dict[str, Any] = {"method": scope["method"], "path": scope["path"][:200], "status": status}
        fields |= {"ms": round(1000 * took_s), "model": model, "outcome": outcome, "key": key.name if key else ""}
        _log.info("request", extra=fields)
        self._count(route, model, outcome, took_s)

    def _check(self, scope: Scope) -> None:
        path, headers, doors = scope["path"], Headers(scope=scope), self._doors
        _check_head(scope, headers, doors.is_local)
        if _OPEN.fullmatch(path):
            return
        if doors.has_page and _PAGE.fullmatch(path):
            if scope["method"] not in ("GET", "HEAD"):
                _check_length(headers.get("content-length", ""))  # a browser always says it
            return
        authorization = headers.get("authorization", "")
        if path == _METRICS:
            owner = doors.admin.owner(authorization) or doors.api.owner(authorization)
            if owner is None and (doors.api.are_there or doors.admin.are_there):
                raise _no_key("an API key or the admin key")
        elif _ADMIN.fullmatch(path) and doors.admin.are_there:
            scope["state"]["key"] = doors.admin.owner(authorization)
            if scope["state"]["key"] is None:
                raise _no_key("the admin key, from its --admin-key-file")
        elif _API.fullmatch(path):
            self._let_in(scope, doors.api.owner(authorization))
        else:
            raise Refusal(404, f"There is no {scope['method']} {path[:200]!r} here.", "not_found")

    def _let_in(self, scope: Scope, key: Key | None) -> None:
        if key is None and self._doors.api.are_there:
            raise _no_key("an API key, from its --api-key-file")
        scope["state"]["key"] = key
        owner = key.name if key else str((scope.get("client") or ("",))[0])
        rate = key.rate if key else None
        scope["state"]["charge"] = lambda cost: self._doors.rates.take(owner, rate, cost)
        if scope["method"] == "POST":
            self._doors.rates.take(owner, rate)

    def _ending(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, but the page's endless streams hear of the end when the server is over: they would hold it up."""
        if not scope["path"].startswith("/gradio_api/") or scope["method"] != "GET":
            return receive

        async def receive_or_end() -> Event:
            waiting = asyncio.ensure_future(receive())
            try:
                while not self._is_over():
                    done, _ = await asyncio.wait([waiting], timeout=0.2)
                    if done:
                        return waiting.result()
                await asyncio.wait([waiting], timeout=_LAST_WORDS_S)
                return {"type": "http.disconnect"}
            finally:
                waiting.cancel()

        return receive_or_end


def answer(refusal: Refusal) -> JSONResponse:
    """A refusal as a response."""
    return JSONResponse(refusal.body(), refusal.status, dict(refusal.headers))


async def read_body(request: Request) -> bytes:
    """A JSON body of bounded size. Raises Refusal: 415 for other types, 413 for too much, 408 for too slow."""
    _check_type(request.headers)
    _check_length(request.headers.get("content-length", "0"))
    chunks: list[bytes] = []
    n_bytes = 0
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                n_bytes += len(chunk)
                if n_bytes > MAX_BODY:
                    raise _too_large()
                chunks.append(chunk)
    except TimeoutError:
        raise Refusal(408, f"The body did not arrive within {BODY_S:.0f} s.", "timeout") from None
    return b"".join(chunks)


def _check_head(scope: Scope, headers: Headers, is_local: bool) -> None:
    if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["path"]) > MAX_HEAD:
        raise Refusal(431, f"The request's head has more than {MAX_HEAD:,} bytes.", "head_too_large")
    if "transfer-encoding" in headers and "content-length" in headers:  # a proxy could read it otherwise
        raise Refusal(400, "A body has one length: Content-Length or Transfer-Encoding, not both.", "invalid_head")
    if is_local and not _is_of_this_machine(headers.get("host", "")):
        says = "Without API keys this server answers under a name of its own machine alone, as in 127.0.0.1."
        raise Refusal(403, says, "foreign_host")


def _no_key(what: str) -> Refusal:
    says = f"This server wants {what}: send `Authorization: Bearer KEY`."
    return Refusal(401, says, "invalid_api_key", headers={"www-authenticate": "Bearer"})


def _outcome(status: int) -> str:
    if status == _GONE:
        return "gone"
    names = {429: "rate_limited", 503: "unavailable"}
    return names.get(status, "ok" if status < 400 else "refused" if status < 500 else "failed")


def _is_of_this_machine(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name.lower() in ("localhost", "[::1]"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_type(headers: Headers) -> None:
    parsed = Message()
    parsed["content-type"] = headers.get("content-type", "")
    charset = (parsed.get_content_charset() or "utf-8").replace("_", "-")
    if parsed.get_content_type() != "application/json" or charset not in ("utf-8", "utf8"):
        raise Refusal(
            415, "Send JSON in UTF-8, with the header `Content-Type: application/json`.", "unsupported_media_type"
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "Send the body without a Content-Encoding.", "unsupported_media_type")


def _check_length(length: str) -> None:
    if not length.isascii() or not length.isdigit() or len(length) > 20 or int(length) > MAX_BODY:
        raise _too_large()


def _too_large() -> Refusal:
    return Refusal(413, f"The body has more than {MAX_BODY:,} bytes. Leave out the oldest messages.", "body_too_large")
