"""One request on its way through the engine: its prompt, its place, and the way back to whoever asked."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Generator

from serve.engines.contract import Ask, Reply
from serve.engines.models import Model
from serve.engines.slots import Seat
from serve.engines.writing import Writing
from serve.refusal import Refusal
from serve.scheduler import Ticket
from toolkit.errors import BaseError, DataError
from toolkit.generate import Answer, stream


class Row(Reply):
    """One answer: what it says goes from the engine's thread to the event loop that asked."""

    def __init__(self, ask: Ask, model: Model, prompt: list[int]) -> None:
        self.ask, self.model, self.prompt, self.n_prompt = ask, model, prompt, len(prompt)
        limit = max(1, min(ask.sampling.max_tokens, model.served.context - len(prompt)))
        loaded = model.loaded
        n_columns = model.n_prefix + len(prompt) + limit
        self.ticket = Ticket(ask.model, len(prompt), n_columns, is_alone=model.stack is None)
        self.writing = Writing(loaded.base.tokenizer, prompt, ask.sampling, limit, loaded.ends)
        self.seat: Seat | None = None
        self.pieces: Generator[str, None, Answer] | None = None
        self.since = time.monotonic()
        self.loop = asyncio.get_running_loop()
        self._cancelled = threading.Event()
        self._answer: Answer | None = None
        self._events: asyncio.Queue[str | Answer | Refusal] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[str]:
        """See Reply."""
        while self._answer is None:
            event = await self._events.get()
            if isinstance(event, str):
                yield event
            elif isinstance(event, Refusal):
                raise event
            else:
                self._answer = event

    @property
    def answer(self) -> Answer:
        """See Reply."""
        if self._answer is None:
            raise RuntimeError("the answer is not over yet")
        return self._answer

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody listens any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """See Reply."""
        self._cancelled.set()

    def put(self, event: str | Answer | Refusal) -> None:
        """Take an event in; on the event loop."""
        self._events.put_nowait(event)

    def start_alone(self) -> Generator[str, None, Answer]:
        """The pieces of an answer on a model of its own."""
        loaded = self.model.loaded
        cancelled = self._cancelled.is_set
        return stream(loaded.model, loaded.base.tokenizer, self.prompt, self.ask.sampling, cancelled, loaded.ends)


def render(model: Model, ask: Ask) -> list[int]:
    """The prompt's ids. Raises Refusal for turns that the template does not write, and for more than fit."""
    try:
        prompt = model.loaded.renderer.prompt(ask.turns)
    except (DataError, BaseError) as wrong:
        raise Refusal(400, str(wrong), "invalid_value", "messages") from None
    context = model.served.context
    if len(prompt) >= context:
        raise Refusal(
            400,
            f"This model's maximum context length is {context} tokens, the answer included, and these messages have "
            f"{len(prompt)}. Leave out the oldest ones.",
            "context_length_exceeded",
            "messages",
        )
    return prompt
