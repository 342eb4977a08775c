"""`python -m serve RUN…` = `maltu serve RUN…`: an OpenAI-compatible API at /v1 and a chat page at /.

Settings and run folders are checked, and the port is taken, before anything heavy loads. SIGTERM or Ctrl-C: nothing new
is taken in, what runs is finished, exit 0 within 10 s.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from serve.runs import find_runs
from serve.settings import COMMAND, Settings, read_settings
from toolkit.errors import InputError, MaltuError, Problem

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serve.engines.contract import Engine

FINISH_S = 8.0  # what running answers have to finish in, once the server is told to stop
EXIT_S = 9  # then their connections are cut


def main(argv: Sequence[str] | None = None) -> int:
    """Read the settings and serve; an error of ours is printed without a traceback and becomes its exit code."""
    try:
        return serve(read_settings(sys.argv[1:] if argv is None else argv, os.environ))
    except MaltuError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def serve(settings: Settings) -> int:
    """Open the runs and answer until told to stop. Raises MaltuError for what cannot be served."""
    runs = find_runs(settings.runs, settings.folder)
    with _listen(settings.host, settings.port) as listener:
        address = _address(settings.host, listener.getsockname()[1])
        sys.stdout.write(f"Loading {', '.join(run.name for run in runs)} …\n")
        sys.stdout.flush()
        from serve.engines.models import open_models
        from serve.engines.rows import RowsEngine

        models = open_models(runs, settings.device)
        engine = RowsEngine(models, settings.slots, settings.queue)
        try:
            _run(_app(engine, settings, address), engine, listener, lambda: _announce(settings, address, list(models)))
        finally:
            engine.close()
    return 0


def _app(engine: "Engine", settings: Settings, address: str) -> "FastAPI":
    from serve.api import Bounds, create_app

    app = create_app(engine, Bounds(settings.max_tokens, settings.keys), settings.has_page)
    if settings.has_page:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported
        from serve.ui import mount

        mount(app, address, wants_key=bool(settings.keys))
    return app


def _run(app: "FastAPI", engine: "Engine", listener: socket.socket, on_start: Callable[[], None]) -> None:
    """Run the HTTP server until a signal; uvicorn's own handlers are told what else a signal means here."""
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn, that says when it is ready and lets the engine finish."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_start()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            engine.drain(FINISH_S)
            super().handle_exit(sig, frame)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False, "ws": "none"}
    server = Server(uvicorn.Config(app, lifespan="on", timeout_graceful_shutdown=EXIT_S, server_header=False, **config))
    # uvicorn raises the signal again once it is done; the process ends by itself then, with 0
    before = {sig: signal.signal(sig, lambda *_: None) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, so that a taken port is known before anything loads."""
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


def _address(host: str, port: int) -> str:
    """Where this machine reaches the server."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host.strip("[]"), host)
    return f"http://{f'[{shown}]' if ':' in shown and not shown.startswith('[') else shown}:{port}"


def _announce(settings: Settings, address: str, names: Sequence[str]) -> None:
    page = f"  page    {address}/\n" if settings.has_page else ""
    key = "  key     one of the file's, as `Authorization: Bearer KEY`\n" if settings.keys else ""
    sys.stdout.write(f"Ready.\n{page}  API     {address}/v1\n  models  {', '.join(names)}\n{key}Ctrl-C stops.\n")
    sys.stdout.flush()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # freeing everything that was loaded would take seconds of those a stopping server has
