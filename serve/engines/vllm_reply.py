"""One answer that a vLLM server writes: what is asked of it, and its tokens as text."""

import asyncio
import json
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from serve.engines.contract import Ask
from serve.engines.row import Event, Piece, Told
from serve.engines.vllm_http import Chosen, Chunk, VllmError
from serve.engines.vllm_runs import Handed
from serve.refusal import Refusal
from toolkit.writing import Answer, Finish, TokenLogprob, Writing, spelled

_ODD = 0x9E3779B97F4A7C15
_MASK63 = 2**63 - 1


class VllmReply(Told):
    """See Told. Written on the engine's loop, read on the one that asked."""

    def __init__(self, ask: Ask, handed: Handed, prompt: list[int]) -> None:
        super().__init__()
        self.ask, self.handed, self.served = ask, handed, handed.served
        self.prompt, self.n_prompt = prompt, len(prompt)
        self.limit = max(1, min(ask.sampling.max_tokens, self.served.context - len(prompt)))
        self._writing = Writing(handed.tokenizer, prompt, ask.sampling, self.limit, handed.ends, ask.row)
        self._told: list[TokenLogprob] = []
        self._finish: str | None = None
        self._refusal: Refusal | None = None
        self._task: asyncio.Task[None] | None = None
        self._engine_loop: asyncio.AbstractEventLoop | None = None
        self._is_cancelled = False
        self.has_begun = False

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """See Reply."""
        return self._told[: self._n_logprobs] if self._answer is None else self._answer.logprobs

    @property
    def is_over(self) -> bool:
        """Whether nothing more is said."""
        return self._writing.finish is not None

    def cancel(self) -> None:
        """See Reply."""
        self._is_cancelled = True
        loop = self._engine_loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._stop)

    # On the engine's loop

    def start(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
        """Begin with the work that writes it."""
        self._engine_loop = loop
        self._task = loop.create_task(work)
        if self._is_cancelled or self._refusal is not None:
            self._stop()

    def give_up(self, refusal: Refusal) -> None:
        """Stop, and let who asked know why."""
        self._refusal = refusal
        self._stop()

    def take(self, chunk: Chunk) -> None:
        """Tokens have come. Those behind the end are left out."""
        if chunk.ids:
            self.times.first = self.times.first or time.time_ns()
        pieces: list[str] = []
        for place, token in enumerate(chunk.ids):
            if self.is_over:
                break
            n_before = len(self._writing.ids)
            pieces.append(self._writing.take(token))
            if chunk.logprobs and len(self._writing.ids) > n_before:
                self._told.append(self._spelled(token, chunk.logprobs[place]))
        self._finish = chunk.finish or self._finish
        self._say("".join(pieces))

    def end(self) -> None:
        """The server has said all. Raises VllmError where it broke off."""
        if not self.is_over:
            finishes: dict[str | None, Finish] = {"stop": "stop", "length": "length"}
            if self._finish not in finishes:
                raise VllmError(f"vLLM ended an answer with {self._finish!r}.", 500)
            self._say(self._writing.end(finishes[self._finish]))

    def conclude(self) -> None:
        """Give the answer, whole."""
        self._tell(self._whole())

    def cut_off(self) -> None:
        """Nobody listens any more, or the engine stops: what there is, is the answer, or why there is none."""
        if self._refusal is not None:
            self.refuse(self._refusal)
            return
        if not self.is_over:
            self._say(self._writing.end("cancelled"))
        self._tell(self._whole())

    def refuse(self, refusal: Refusal) -> None:
        """It ends without an answer."""
        self._tell(refusal)

    def _whole(self) -> Answer:
        return replace(self._writing.answer(), logprobs=tuple(self._told))

    def _stop(self) -> None:
        if self._task is None or self._engine_loop is None:
            return
        if self.has_begun:
            self._task.cancel()
        else:  # what is cancelled before it began would hand nothing back
            self._engine_loop.call_soon(self._stop)

    def _say(self, piece: str) -> None:
        if piece:
            self._tell(Piece(piece, len(self._told)))

    def _tell(self, event: Event) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.put, event)

    def _spelled(self, token: int, chosen: Chosen) -> TokenLogprob:
        spell, n = self.handed.tokenizer, self.ask.n_logprobs or 0
        top = tuple(TokenLogprob(one, *spelled(spell, one), logprob) for one, logprob in chosen.top[:n])
        return TokenLogprob(token, *spelled(spell, token), chosen.logprob, top)


def body_of(reply: VllmReply, base: str) -> dict[str, Any]:
    """What is asked of /v1/completions. base: what the server calls its base.

    Everything is said, so that no default of the server's or of the base's own counts. Stop strings are watched for on
    this side. Prompts of one API key are kept apart from those of any other (cache_salt).
    """
    ask, sampling = reply.ask, reply.ask.sampling
    body: dict[str, Any] = {
        "model": reply.handed.lora or base,
        "prompt": reply.prompt,
        "max_tokens": reply.limit,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": _seed(sampling.seed, ask.row),
        "stop_token_ids": sorted(reply.handed.ends),
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "request_id": f"{ask.id}-{ask.row}",
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in dict(sampling.logit_bias).items()}
    if ask.schema is not None:  # its own end of a text is all that can be said behind the last bracket there
        form = {"name": "answer", "schema": json.loads(ask.schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
        body["stop_token_ids"] = sorted({*reply.handed.ends, *_own_end(reply)})
    if ask.n_logprobs is not None:
        body |= {"logprobs": ask.n_logprobs, "return_tokens_as_token_ids": True}
    if ask.key:
        body["cache_salt"] = sha256(f"maltu {ask.key}".encode()).hexdigest()
    return body


def _own_end(reply: VllmReply) -> tuple[int, ...]:
    eos = reply.handed.tokenizer.eos_token_id
    return () if eos is None else (int(eos),)


def _seed(seed: int, row: int) -> int:
    """Several answers to one request draw noise of their own; the first draws that of its seed alone."""
    return seed if row == 0 else (seed + row * _ODD) & _MASK63
