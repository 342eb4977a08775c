"""Answers as OpenAI's API words them: whole ones, the chunks of streamed ones, and the list of models."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve.engines.contract import Reply, Served
from serve.refusal import Refusal, failed
from toolkit.writing import TokenLogprob

DONE = b"data: [DONE]\n\n"
Kind = Literal["chat", "text"]
_PREFIX = {"chat": "chatcmpl-", "text": "cmpl-"}


@dataclass(frozen=True)
class Asked:
    """What of a request its answer repeats. unused: what it said that has no effect; n_dropped: turns left out."""

    id: str
    kind: Kind
    created: int
    unused: list[str]
    wants_logprobs: bool = False
    with_usage: bool = False
    n_dropped: int = 0

    @property
    def response_id(self) -> str:
        """The answer's own id, made of the request's."""
        return _PREFIX[self.kind] + self.id


class Words:
    """Writes the answer of one request from the replies to it, which are its choices in order.

    n_prompts: how many prompts they answer, each with as many choices. on_piece: told of every piece of text as it
    comes, with its choice. texts: what has come of each choice. failure: why it broke off.
    """

    def __init__(self, asked: Asked, replies: Sequence[Reply], n_prompts: int = 1) -> None:
        served = replies[0].served
        self._asked, self._replies, self._n_prompts = asked, replies, n_prompts
        self._n_logprobs = [0] * len(replies)
        self._offsets = [0] * len(replies)
        self.texts = [""] * len(replies)
        self.failure: Refusal | None = None
        self._n_said: list[int] = []  # of the choices that are over
        self._late: Refusal | None = None
        self._maltu = {
            "adapter": served.adapter,
            "routing": routing(served),
            "weights_hash": served.weights_hash,
            "unused": asked.unused,
        } | ({"dropped_turns": asked.n_dropped} if asked.n_dropped else {})
        self._head = {
            "id": asked.response_id,
            "created": asked.created,
            "model": served.name,
            "system_fingerprint": f"fp_{served.weights_hash[:12]}",
        }

    async def whole(self, on_piece: Callable[[int, str], None]) -> dict[str, Any]:
        """The answer, once all of it is there. Raises Refusal where the engine gives one of the replies up."""
        async for _ in self._pieces(on_piece):
            pass
        choices = [self._choice(place, text) for place, text in enumerate(self.texts)]
        name = "chat.completion" if self._asked.kind == "chat" else "text_completion"
        return self._head | {"object": name, "choices": choices, "usage": self.usage(), "maltu": self._told(0)}

    async def events(self, on_piece: Callable[[int, str], None]) -> AsyncIterator[bytes]:
        """The answer as server-sent events; `maltu` stands in the first and the last of each choice.

        A reply that fails half way ends with an event that holds the error, and without [DONE].
        """
        null_usage: dict[str, Any] = {"usage": None} if self._asked.with_usage else {}
        told = {"maltu": self._maltu} | null_usage
        if self._asked.kind == "chat":
            for place in range(len(self._replies)):
                yield self._chunk(place, {"delta": {"role": "assistant", "content": ""}}, None, told)
        try:
            async for place, piece in self._pieces(on_piece):
                if piece is None:
                    finish = self._replies[place].answer.finish
                    yield self._chunk(place, self._delta(""), finish, {"maltu": self._told(place)} | null_usage)
                else:
                    yield self._chunk(place, self._delta(piece), None, null_usage)
        except Refusal as refusal:
            yield event(refusal.body())
            return
        if self._asked.with_usage:
            yield event(self._head | {"object": self._object, "choices": [], "usage": self.usage()})
        yield DONE

    @property
    def response_id(self) -> str:
        """The answer's own id."""
        return self._asked.response_id

    @property
    def n_tokens(self) -> tuple[int, int]:
        """Tokens read, and written by the choices that are over; a prompt counts once, whatever n."""
        n_each = len(self._replies) // self._n_prompts
        n_prompt = sum(reply.n_prompt for reply in self._replies[::n_each])
        return n_prompt, sum(self._n_said)

    def usage(self) -> dict[str, Any]:
        """Tokens read and written."""
        n_prompt, n_said = self.n_tokens
        return {"prompt_tokens": n_prompt, "completion_tokens": n_said, "total_tokens": n_prompt + n_said}

    @property
    def is_over(self) -> bool:
        """Whether every choice has come to its end."""
        return len(self._n_said) == len(self._replies)

    def give_up(self, limit_s: float) -> None:
        """The answer has taken too long: nothing is written any more, and it ends with an error."""
        says = f"The answer took longer than {limit_s:g} s. Ask for fewer tokens, or try again when less is going on."
        self._late = Refusal(503, says, "timeout", headers={"retry-after": "10"})
        for reply in self._replies:
            reply.cancel()

    async def _pieces(self, on_piece: Callable[[int, str], None]) -> AsyncIterator[tuple[int, str | None]]:
        try:
            async for place, piece in merged(self._replies):
                if self._late is not None:
                    raise self._late
                if piece is None:
                    self._n_said.append(len(self._replies[place].answer.ids))
                elif piece:
                    on_piece(place, piece)
                    self.texts[place] += piece
                else:
                    continue
                yield place, piece
        except Exception as error:
            self.failure = error if isinstance(error, Refusal) else failed(self._asked.id)
            raise

    def _told(self, place: int) -> dict[str, Any]:
        """`maltu` of a choice that is over: who answered in the end is known then."""
        routed = self._replies[place].answer.routing
        if not routed:
            return self._maltu
        kind = self._replies[place].served.combination or "route"  # a router's choice is served under its own name
        return self._maltu | {"routing": {"kind": kind, "weights": dict(routed)}}

    @property
    def _object(self) -> str:
        return "chat.completion.chunk" if self._asked.kind == "chat" else "text_completion"

    def _delta(self, piece: str) -> dict[str, Any]:
        if self._asked.kind == "text":
            return {"text": piece}
        return {"delta": {"content": piece} if piece else {}}

    def _choice(self, place: int, text: str) -> dict[str, Any]:
        reply = self._replies[place]
        said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        own = said if self._asked.kind == "chat" else {"text": text}
        return {"index": place, **own, "logprobs": self._logprobs(place), "finish_reason": reply.answer.finish}

    def _chunk(self, place: int, own: dict[str, Any], finish: str | None, more: dict[str, Any]) -> bytes:
        choice = {"index": place, **own, "logprobs": self._logprobs(place), "finish_reason": finish}
        return event(self._head | {"object": self._object, "choices": [choice]} | more)

    def _logprobs(self, place: int) -> dict[str, Any] | None:
        """Those of the tokens that have come since the last time."""
        if not self._asked.wants_logprobs:
            return None
        new = self._replies[place].logprobs[self._n_logprobs[place] :]
        self._n_logprobs[place] += len(new)
        if self._asked.kind == "chat":
            return {"content": [_token(one) | {"top_logprobs": [_token(top) for top in one.top]} for one in new]}
        start, offsets = self._offsets[place], []
        for one in new:
            offsets.append(start)
            start += len(one.token)
        self._offsets[place] = start
        return {
            "tokens": [one.token for one in new],
            "token_logprobs": [one.logprob for one in new],
            "top_logprobs": [{top.token: top.logprob for top in one.top} for one in new],
            "text_offset": offsets,
        }


async def merged(replies: Sequence[Reply]) -> AsyncIterator[tuple[int, str | None]]:
    """The pieces of several replies as they come, each with its place, and None once a reply is over.

    Raises what any of them raises.
    """
    if len(replies) == 1:
        async for piece in replies[0]:
            yield 0, piece
        yield 0, None
        return
    queue: asyncio.Queue[tuple[int, str | BaseException | None]] = asyncio.Queue()

    async def listen(place: int, reply: Reply) -> None:
        try:
            async for piece in reply:
                queue.put_nowait((place, piece))
            queue.put_nowait((place, None))
        except Exception as error:
            queue.put_nowait((place, error))

    listening = [asyncio.create_task(listen(place, reply)) for place, reply in enumerate(replies)]
    try:
        n_left = len(replies)
        while n_left:
            place, came = await queue.get()
            if isinstance(came, BaseException):
                raise came
            n_left -= came is None
            yield place, came
    finally:
        for task in listening:
            task.cancel()


def routing(served: Served) -> dict[str, Any] | None:
    """How several answer as one, and with which weights; None where one alone does."""
    if served.combination is None:
        return None
    return {"kind": served.combination, "weights": dict(served.members)}


def model_entry(served: Served, state: str, *, is_int8: bool) -> dict[str, Any]:
    """One model of /v1/models."""
    kind = "run" if served.adapter is not None or served.combination is not None else "base"
    own = {
        "kind": "expert" if "/" in served.name else kind,
        "state": state,
        "task": served.task,
        "base": served.base,
        "base_hash": served.base_hash,
        "weights_hash": served.weights_hash,
        "cpu_int8": is_int8,
        "context": served.context,
        "defaults": dict(served.defaults),
        "routing": routing(served),
    }
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "maltu", "maltu": own}


def event(payload: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _token(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.logprob, "bytes": list(one.bytes)}
