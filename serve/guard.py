"""What stands before every route: the request's id, the API key, the bounds of a body, and the page's few own routes.

Every route is closed unless it is named here. Without keys the API's routes are open to whoever reaches the address.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from email.message import Message

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from serve.refusal import Refusal, failed

_log = logging.getLogger("maltu.serve")

MAX_BODY = 2**20
BODY_S = 30.0  # how long a body may take to arrive
_GONE = 499  # in the log: the client left before it had sent its request
_LAST_WORDS_S = 0.5  # what the page has to show the end of an answer once the server is over

_OPEN = re.compile(r"/healthz|/readyz")
_API = re.compile(r"/v1/.*|/openapi\.json", re.DOTALL)
# What the chat page loads and calls. Gradio has more (uploads, files, proxies, developer's tools): they stay shut.
_PAGE = re.compile(
    r"/|/(theme\.css|favicon\.ico|manifest\.json|pwa_icon|robots\.txt|config)/?|/(assets|static|svelte)/[\w./+-]+"
    r"|/gradio_api/(theme\.css|info|app_id|startup-events|cancel|reset|queue/(join|data)|heartbeat/\w+)/?"
)


class Keys:
    """API keys, kept as digests and compared in constant time. No keys at all let everybody in."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def allow(self, authorization: str) -> bool:
        """Whether an Authorization header carries one of the keys."""
        if not self._digests:
            return True
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        found = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them, always
        return scheme.lower() == "bearer" and any(found)


class Guard:
    """The outermost layer of the app. `has_page`: whether the chat page is mounted."""

    def __init__(self, app: ASGIApp, keys: Keys, has_page: bool, is_over: Callable[[], bool]) -> None:
        self._app, self._keys, self._has_page, self._is_over = app, keys, has_page, is_over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, answer it with a refusal, or with 500 and its id when something breaks."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # no route here speaks websocket
            return await send({"type": "websocket.close", "code": 1000})
        request_id, since = uuid.uuid4().hex, time.monotonic()
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(event: Event) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
                MutableHeaders(scope=event)["x-request-id"] = request_id
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
        took_ms = 1000 * (time.monotonic() - since)
        if not _PAGE.fullmatch(scope["path"]):
            _log.info("%s %s %r %d %.0f ms", request_id, scope["method"], scope["path"], status, took_ms)

    def _check(self, scope: Scope) -> None:
        path = scope["path"]
        if _OPEN.fullmatch(path):
            return
        if self._has_page and _PAGE.fullmatch(path):
            if scope["method"] not in ("GET", "HEAD"):
                _check_length(Headers(scope=scope).get("content-length", ""))  # a browser always says it
            return
        if not _API.fullmatch(path):
            raise Refusal(404, f"There is no {scope['method']} {path[:200]!r} here.", "not_found")
        if not self._keys.allow(Headers(scope=scope).get("authorization", "")):
            says = "This server wants an API key: send `Authorization: Bearer KEY`, with a key from its --api-key-file."
            raise Refusal(401, says, "invalid_api_key", headers={"www-authenticate": "Bearer"})

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


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
