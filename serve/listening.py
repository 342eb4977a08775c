"""The socket and the HTTP server on it: what is refused before anything loads, and connections that lead nowhere."""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from serve.settings import COMMAND
from toolkit.errors import InputError, Problem

SILENT_S = 30.0  # how long a client may say nothing, and read nothing of what it is sent
_LOOK_S = 5.0
_MAX_HEAD = 2**16  # bytes; a head that came in whole is judged by the guard
_BACKLOG = 512


def patient(protocol: type[Any]) -> type[Any]:
    """One of uvicorn's HTTP protocols, with connections that are cut off where they lead nowhere."""

    class Patient(protocol):  # type: ignore[misc]
        """HTTP on one connection, which is cut off when it leads nowhere.

        A client that has not asked for anything SILENT_S after it could, or that reads nothing for so long while it is
        being answered, would keep its connection forever.
        """

        silent_s, look_s = SILENT_S, _LOOK_S

        def connection_made(self, transport: Any) -> None:
            """Begin to look at it now and then."""
            super().connection_made(transport)
            self._idle_since: float | None = time.monotonic()
            self._stuck: tuple[int, float] | None = None
            self._n_head = 0
            self._look = self.loop.call_later(self.look_s, self._judge)

        def data_received(self, data: bytes) -> None:
            """Read on, but not into a head without end."""
            super().data_received(data)
            self._n_head = 0 if self._is_busy else self._n_head + len(data)
            if self._n_head > _MAX_HEAD:
                self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            """It is gone."""
            self._look.cancel()
            super().connection_lost(exc)

        @property
        def _is_busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _judge(self) -> None:
            now = time.monotonic()
            self._idle_since = None if self._is_busy else self._idle_since or now
            n_unsent = self.transport.get_write_buffer_size()
            if not n_unsent:
                self._stuck = None
            elif self._stuck is None or self._stuck[0] != n_unsent:
                self._stuck = n_unsent, now
            since = [self._idle_since, self._stuck[1] if self._stuck else None]
            if any(one is not None and now - one >= self.silent_s for one in since):
                self.transport.abort()
                return
            self._look = self.loop.call_later(self.look_s, self._judge)

    return Patient


class Server(uvicorn.Server):
    """uvicorn, that says when it is ready, and lets others know of a signal first."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None], on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start, self._on_signal = on_start, on_signal

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn."""
        self._on_signal()
        super().handle_exit(sig, frame)


def make_server(
    app: Any,
    exit_s: int,
    on_start: Callable[[], None] = lambda: None,
    on_signal: Callable[[], None] = lambda: None,
    http: type[Any] | None = None,
) -> Server:
    """A server for an app; once told to stop it cuts connections after `exit_s`."""
    config: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False, "ws": "none"}
    config |= {"server_header": False, "backlog": _BACKLOG, "http": http or patient(AutoHTTPProtocol), "lifespan": "on"}
    return Server(uvicorn.Config(app, timeout_graceful_shutdown=exit_s, **config), on_start, on_signal)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, so that a taken port is known before anything loads. Raises InputError."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            if os.name == "posix":  # elsewhere the option would share the port with whoever has it
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            undo.pop_all()
        return listener
    except OSError as error:
        says = (
            f"{host}:{port} cannot be listened on ({error.strerror or error}). Take another, as in --port {port + 1}."
        )
        raise InputError(COMMAND, [Problem("--port", says)]) from None


def address_of(host: str, port: int) -> str:
    """Where this machine reaches the server."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host.strip("[]"), host)
    return f"http://{f'[{shown}]' if ':' in shown and not shown.startswith('[') else shown}:{port}"
