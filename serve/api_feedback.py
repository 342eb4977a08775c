"""The routes of feedback: give it, see one's own, delete it. With keys everybody sees and deletes what came with their
key; where strangers may come in without one, only what came with a conversation's id that the caller knows.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from serve.feedback import Feedback, Recent, record_of, shown
from serve.guard import read_body
from serve.metrics import Metrics
from serve.reading import read_model
from serve.refusal import Refusal
from serve.schemas import CONVERSATION
from serve.store import Store, Which

Conversation = Annotated[str | None, Query(pattern=CONVERSATION)]
Id = Annotated[str | None, Query(pattern="^[0-9a-f]{32}$")]
Limit = Annotated[int, Query(ge=1, le=500)]


@dataclass(frozen=True)
class Opinions:
    """What the routes need: the store (None: feedback is off), what is known of the last answers, the counts."""

    store: Store | None
    recent: Recent
    metrics: Metrics
    is_shared: bool

    def open(self) -> Store:
        """The store. Raises Refusal: 404 where feedback is off."""
        if self.store is None:
            raise Refusal(404, "This server takes no feedback in: it was started with --store none.", "feedback_off")
        return self.store

    def which(self, request: Request, conversation: str | None) -> Which:
        """What the caller may see. Raises Refusal: 403 for strangers that name no conversation."""
        key = request.state.key
        if key is None and self.is_shared and conversation is None:
            says = "Without API keys everybody's feedback lies together here: name the conversation."
            raise Refusal(403, says, "conversation_required", "conversation")
        return Which(key.name if key else "", conversation)


def add_feedback(app: FastAPI, opinions: Opinions) -> None:
    """Add the routes."""

    @app.post("/v1/feedback", response_model=None, status_code=201)
    async def give(request: Request) -> Response:
        """Store a thumb, a pair or a correction; it is on the disk once this answers."""
        store = opinions.open()
        given = read_model(Feedback, await read_body(request)).root
        key = request.state.key
        record, is_known = record_of(given, key.name if key else "", opinions.recent)
        has_replaced = await run_in_threadpool(store.add, record)
        opinions.metrics.feedback(record.kind)
        told = {"id": record.id, "object": "feedback", "created": record.created_ms // 1000}
        return JSONResponse(told | {"kind": record.kind, "known": is_known, "replaced": has_replaced}, 201)

    @app.get("/v1/feedback")
    async def see(
        request: Request, conversation: Conversation = None, after: Id = None, limit: Limit = 100
    ) -> dict[str, Any]:
        """One's own feedback, oldest first; `after`: the last id that is known already."""
        store, which = opinions.open(), opinions.which(request, conversation)
        found = await run_in_threadpool(store.feedback, which, limit + 1, after)
        return {"object": "list", "data": list(map(shown, found[:limit])), "has_more": len(found) > limit}

    @app.delete("/v1/feedback")
    async def forget(request: Request, conversation: Conversation = None, all: bool = False) -> dict[str, Any]:
        """Delete what was stored of a conversation, or with `all=true` all that is one's own: feedback and answers."""
        store = opinions.open()
        if (conversation is None) == (not all):
            raise Refusal(400, "Say what to delete: conversation=ID, or all=true.", "invalid_value", "conversation")
        which = opinions.which(request, conversation)
        n_feedback, n_answers = await run_in_threadpool(store.delete, which)
        return {"object": "deleted", "feedback": n_feedback, "answers": n_answers}

    @app.delete("/v1/feedback/{id}")
    async def forget_one(request: Request, id: str, conversation: Conversation = None) -> dict[str, Any]:
        """Delete one piece of feedback. 404 where it is not there, or not one's own."""
        store, which = opinions.open(), opinions.which(request, conversation)
        n_feedback, _ = await run_in_threadpool(store.delete, which, id)
        if not n_feedback:
            raise Refusal(404, f"There is no feedback {id[:80]!r} of yours.", "not_found", "id")
        return {"object": "deleted", "feedback": n_feedback, "answers": 0}
