"""What needs the admin key: runs come and go while the server answers, and what was stored of an owner is deleted.

Runs are named, never given as paths: only what lies in the server's own runs folder can be loaded.
"""

from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from serve.engines.contract import Engine
from serve.guard import read_body
from serve.keys import NAME
from serve.metrics import Metrics
from serve.names import refuse_name
from serve.reading import Strict, read_model
from serve.refusal import Refusal, unsupported
from serve.store import Store, Which
from toolkit.bundle import RUN_FILE, Run, open_run
from toolkit.errors import RunError


class Named(Strict):
    """A request that names a run."""

    run: str = Field(min_length=1, max_length=200)


def add_admin(app: FastAPI, engine: Engine, store: Store | None, metrics: Metrics, folder: Path | None) -> None:
    """Add the routes; the guard lets nobody near them without the admin key. folder: where runs are looked up."""

    async def change(request: Request, action: str) -> dict[str, Any]:
        name = read_model(Named, await read_body(request)).run
        outcome = "refused"
        try:
            add = None if action == "unload" else await run_in_threadpool(find_run, name, folder)
            if action == "load" and name in engine.models():
                raise Refusal(409, f"{name} is loaded already. Reload it instead.", "loaded_already", "run")
            if action != "load" and name not in engine.models():
                raise Refusal(404, f"{name[:80]!r} is not loaded.", "model_not_found", "run")
            await engine.change(add, None if action == "load" else name)
            outcome = "ok"
        finally:
            metrics.change(action, outcome)
        served = engine.models().get(name)
        weights_hash = None if served is None else served.weights_hash
        return {"object": action, "run": name, "weights_hash": weights_hash, "models": list(engine.models())}

    @app.post("/admin/load")
    async def load(request: Request) -> dict[str, Any]:
        """Load a run of the runs folder."""
        return await change(request, "load")

    @app.post("/admin/unload")
    async def unload(request: Request) -> dict[str, Any]:
        """Unload a run; who is being answered by it is answered to the end."""
        return await change(request, "unload")

    @app.post("/admin/reload")
    async def reload(request: Request) -> dict[str, Any]:
        """Load a run again, as it lies in the runs folder by now."""
        return await change(request, "reload")

    @app.delete("/admin/feedback")
    async def forget(
        key: Annotated[str | None, Query(pattern=f"^{NAME.pattern}$")] = None,
        conversation: Annotated[str | None, Query(max_length=64)] = None,
    ) -> dict[str, Any]:
        """Delete all that was stored of an owner of keys, or of a conversation."""
        if store is None:
            raise Refusal(404, "This server stores nothing: it was started with --store none.", "feedback_off")
        if key is None and conversation is None:
            raise Refusal(400, "Say what to delete: key=NAME or conversation=ID.", "invalid_value", "key")
        n_feedback, n_answers = await run_in_threadpool(store.delete, Which(key, conversation))
        return {"object": "deleted", "feedback": n_feedback, "answers": n_answers}


def find_run(name: str, folder: Path | None) -> Run:
    """The run of that name in the folder.

    Raises Refusal: 400 for a word that could be a path or means something else in a request, 404 where there is none,
    400 for one that is not finished or damaged.
    """
    if folder is None:
        raise unsupported("run", "This server was started without a runs folder.")
    if refuse_name(name) or name.startswith(".") or Path(name).name != name or "\\" in name or "\0" in name:
        raise Refusal(400, f"{name[:80]!r} is no run's name. Name a folder of the runs folder.", "invalid_value", "run")
    path = folder / name
    if not (path / RUN_FILE).is_file():
        raise Refusal(404, f"There is no run {name[:80]!r} in the runs folder.", "run_not_found", "run")
    try:
        run = open_run(path.resolve())
        run.finished("base")
    except RunError as error:
        raise Refusal(400, str(error), "run_unfit", "run") from None
    return run
