"""`python -m serve RUN…` = `maltu serve RUN…`: an OpenAI-compatible API at /v1 and a chat page at /.

Settings and run folders are checked, the port is taken and the store opened before anything heavy loads. SIGTERM or
Ctrl-C: nothing new is taken in, what runs is finished, exit 0 within 10 s. `python -m serve key|feedback|openapi …` are
commands of their own (serve/commands.py).
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from serve.commands import COMMANDS, run_command
from serve.runs import find_runs, has_bases
from serve.settings import Settings, is_loopback, read_settings
from toolkit.errors import MaltuError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serve.engines.contract import Engine
    from serve.store import Store
    from serve.tracing import Tracing
    from toolkit.bundle import Run

FINISH_S = 8.0  # what running answers have to finish in, once the server is told to stop
EXIT_S = 9  # then their connections are cut


def main(argv: Sequence[str] | None = None) -> int:
    """Read the settings and serve; an error of ours is printed without a traceback and becomes its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words and words[0] in COMMANDS:
            return run_command(words)
        return serve(read_settings(words, os.environ))
    except MaltuError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def serve(settings: Settings) -> int:
    """Open the runs and answer until told to stop. Raises MaltuError for what cannot be served."""
    runs = find_runs(settings.runs, settings.folder)
    from serve.listening import address_of, listen

    with listen(settings.host, settings.port) as listener:
        address = address_of(settings.host, listener.getsockname()[1])
        tracing = _open_tracing(settings)
        store = _open_store(settings)
        sys.stdout.write(f"Loading {', '.join(run.name for run in runs)} …\n")
        sys.stdout.flush()
        engine = _open_engine(settings, runs)
        try:
            app = _app(engine, settings, address, store, tracing)
            _run(app, engine, listener, lambda: _announce(settings, address, engine, store))
        finally:
            engine.close()
            if store is not None:
                store.close()
            if tracing is not None:
                tracing.close()
    return 0


def _open_engine(settings: Settings, runs: Sequence["Run"]) -> "Engine":
    if settings.vllm_url is not None:
        from serve.engines.vllm import VllmEngine
        from serve.engines.vllm_runs import describe_runs

        return VllmEngine(describe_runs(runs), settings.vllm_url, settings.vllm_key, settings.slots, settings.queue)
    if has_bases(runs[0], runs[0].facts()):
        from serve.engines.bases import BasesEngine
        from serve.engines.bases_panel import open_panel
        from toolkit.errors import BaseError

        if settings.is_int8:
            raise BaseError(f"--cpu-int8: the members of {runs[0].name} stand on bases of their own. Leave it out.")
        return BasesEngine(open_panel(runs[0], settings.device), settings.queue)
    import torch

    from serve.engines.models import open_models
    from serve.engines.rows import RowsEngine

    adapters_in = torch.float64 if settings.is_int8 else torch.float32
    models = open_models(runs, settings.device, adapters_in)
    return RowsEngine(models, settings.slots, settings.queue, forward=settings.forward, int8=settings.is_int8)


def _open_store(settings: Settings) -> "Store | None":
    if settings.store is None:
        return None
    from serve.store import Store

    return Store(settings.store)


def _open_tracing(settings: Settings) -> "Tracing | None":
    if settings.traces is None:
        return None
    from serve.tracing import open_tracing

    return open_tracing(settings.traces)


def _app(
    engine: "Engine", settings: Settings, address: str, store: "Store | None", tracing: "Tracing | None"
) -> "FastAPI":
    from serve.api import Bounds, create_app

    is_local = is_loopback(settings.host)
    bounds = Bounds(
        max_tokens=settings.max_tokens,
        keys=settings.keys,
        admin_keys=settings.admin_keys,
        answer_s=settings.answer_s,
        rate=settings.rate,
        is_local=is_local and settings.is_open,
        is_shared=not is_local and settings.is_open,
        keeps=settings.keeps,
        n_slots=settings.slots,
        folder=settings.folder,
    )
    app = create_app(engine, bounds, settings.has_page, store, tracing)
    if settings.has_page:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported
        from serve.ui.page import mount

        mount(app, address, wants_key=not settings.is_open)
    return app


def _run(app: "FastAPI", engine: "Engine", listener: socket.socket, on_start: Callable[[], None]) -> None:
    """Run the HTTP server until a signal; uvicorn's own handlers are told what else a signal means here."""
    from serve.listening import make_server
    from serve.logs import write_json

    write_json(sys.stderr)
    server = make_server(app, EXIT_S, on_start, lambda: engine.drain(FINISH_S))
    # uvicorn raises the signal again once it is done; the process ends by itself then, with 0
    before = {sig: signal.signal(sig, lambda *_: None) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _announce(settings: Settings, address: str, engine: "Engine", store: "Store | None") -> None:
    lines = [f"  page      {address}/"] if settings.has_page else []
    lines += [f"  API       {address}/v1", f"  models    {', '.join(engine.models())}"]
    computes = f"vLLM at {settings.vllm_url}" if settings.vllm_url else engine.computes
    lines += [f"  computes  {computes}"] if computes else []
    lines += [f"  feedback  {store.place}"] if store is not None else []
    lines += [f"  traces    {settings.traces}"] if settings.traces else []
    lines += ["  kept      conversations, in the same place"] if settings.keeps else []
    lines += [] if settings.is_open else ["  key       one of the file's, as `Authorization: Bearer KEY`"]
    lines += ["  admin     /admin, with an admin key"] if settings.admin_keys else []
    sys.stdout.write("\n".join(["Ready.", *lines, "Ctrl-C stops.\n"]))
    sys.stdout.flush()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # freeing everything that was loaded would take seconds of those a stopping server has
