"""Answers as OpenAI's API words them: a whole completion, or the chunks of a streamed one, and the list of models."""

import json
from collections.abc import AsyncIterator
from typing import Any

from serve.engines.contract import Reply, Served
from serve.refusal import Refusal
from toolkit.generate import Answer

DONE = b"data: [DONE]\n\n"


class Words:
    """Writes one request's answer. `unused`: what the request said that has no effect."""

    def __init__(self, request_id: str, served: Served, created: int, unused: list[str]) -> None:
        self._served = served
        self._maltu = {"adapter": served.adapter, "weights_hash": served.weights_hash, "unused": unused}
        self._head = {
            "id": f"chatcmpl-{request_id}",
            "created": created,
            "model": served.name,
            "system_fingerprint": f"fp_{served.weights_hash[:12]}",
        }

    def completion(self, text: str, answer: Answer, n_prompt: int) -> dict[str, Any]:
        """The whole answer."""
        said = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": answer.finish}
        head = self._head | {"object": "chat.completion"}
        return head | {"choices": [choice], "usage": usage(answer, n_prompt), "maltu": self._maltu}

    async def events(self, reply: Reply, with_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events; `maltu` stands in the first and the last with a choice.

        A reply that fails half way ends with an event that holds the error, and without [DONE].
        """
        null_usage: dict[str, Any] = {"usage": None} if with_usage else {}
        yield self._chunk({"role": "assistant", "content": ""}, None, {"maltu": self._maltu} | null_usage)
        try:
            async for piece in reply:
                if piece:
                    yield self._chunk({"content": piece}, None, null_usage)
        except Refusal as refusal:
            yield event(refusal.body())
            return
        yield self._chunk({}, reply.answer.finish, {"maltu": self._maltu} | null_usage)
        if with_usage:
            head = self._head | {"object": "chat.completion.chunk"}
            yield event(head | {"choices": [], "usage": usage(reply.answer, reply.n_prompt)})
        yield DONE

    def _chunk(self, delta: dict[str, Any], finish: str | None, more: dict[str, Any]) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event(self._head | {"object": "chat.completion.chunk", "choices": [choice]} | more)


def usage(answer: Answer, n_prompt: int) -> dict[str, int]:
    """Tokens read and written."""
    n_said = len(answer.ids)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_said, "total_tokens": n_prompt + n_said}


def model_entry(served: Served, state: str) -> dict[str, Any]:
    """One model of /v1/models."""
    own = {
        "kind": "base" if served.adapter is None else "run",
        "state": state,
        "task": served.task,
        "base": served.base,
        "base_hash": served.base_hash,
        "weights_hash": served.weights_hash,
        "context": served.context,
        "defaults": dict(served.defaults),
    }
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "maltu", "maltu": own}


def event(payload: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
