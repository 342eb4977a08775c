"""One request on its way through the engine: its prompt, its places in the batch, and the way back to whoever asked.

A request of one model is one voice with one lane. A mixture is one voice with a lane for each member, whose logits meet
where a token is chosen. A vote is a voice for each member, with a lane each.
"""

# K lanes of a voice, R rows of a step, V vocabulary.

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from serve.engines.contract import Ask, Reply, Times
from serve.engines.models import Model
from serve.engines.slots import Seat
from serve.engines.teams import Team
from serve.refusal import Refusal
from serve.scheduler import Ticket
from toolkit.combine.mix import Over, mixed_logits
from toolkit.combine.vote import majority
from toolkit.corpus.render import Renderer
from toolkit.errors import BaseError, DataError, InputError
from toolkit.generate import write
from toolkit.grammar import Grammar
from toolkit.writing import Answer, TokenLogprob, Writing


class Piece(NamedTuple):
    """Text that can be shown, and how many log-probabilities are known with it."""

    text: str
    n_logprobs: int


Event = Piece | Answer | Refusal


@dataclass(eq=False)
class Lane:
    """A row of the batch: a model that reads the prompt and what its voice says."""

    voice: "Voice"
    model: Model
    seat: Seat | None = None

    @property
    def scope(self) -> Hashable:
        """What has to be equal for keys and values of one row to be good for another, beside the tokens."""
        return (*self.model.hashes, self.voice.row.ask.key)


@dataclass(eq=False)
class Voice:
    """A text in the making, and the lanes whose logits it is chosen from. name, share: who says it in a vote."""

    row: "Row"
    writing: Writing
    name: str
    weights: Sequence[float] = (1.0,)
    over: Over = "logprob"
    lanes: list[Lane] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether nothing more is said."""
        return self.writing.finish is not None

    def logits(self, logits_KV: Tensor) -> Tensor:
        """What follows, from what each lane says. Raises: MaltuError where one of several says what is no number."""
        return logits_KV[0] if len(self.lanes) == 1 else mixed_logits(logits_KV, self.weights, self.over)


class Told(Reply):
    """A reply that another thread tells, event by event, to the event loop that it was made on."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.times: Times = Times()
        self._answer: Answer | None = None
        self._n_logprobs = 0
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._cancelled = threading.Event()

    async def __aiter__(self) -> AsyncIterator[str]:
        """See Reply."""
        while self._answer is None:
            event = await self._events.get()
            if isinstance(event, Piece):
                self._n_logprobs = event.n_logprobs
                yield event.text
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

    def put(self, event: Event) -> None:
        """Take an event in; on the event loop."""
        if not isinstance(event, Piece):
            self.times.over = time.time_ns()
        self._events.put_nowait(event)


class Row(Told):
    """One answer: what it says goes from the engine's thread to the event loop that asked. grammar: of its schema."""

    def __init__(self, ask: Ask, team: Team, prompt: list[int], grammar: Grammar | None = None) -> None:
        super().__init__()
        self.ask, self.team, self.served = ask, team, team.served
        self.prompt, self.n_prompt = prompt, len(prompt)
        limit = max(1, min(ask.sampling.max_tokens, team.served.context - len(prompt)))
        self.voices = self._voices(limit, grammar)
        n_prefix = max(model.n_prefix for model in team.models)
        is_alone = team.models[0].stack is None
        n_columns = n_prefix + len(prompt) + limit
        self.ticket = Ticket(team.label, len(prompt), n_columns, is_alone, n_rows=len(team.models))
        self.pieces: Generator[str, None, None] | None = None
        self.since = time.monotonic()

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """See Reply."""
        if self._answer is not None:
            return self._answer.logprobs
        return self.voices[0].writing.logprobs[: self._n_logprobs] if len(self.voices) == 1 else ()

    @property
    def lanes(self) -> list[Lane]:
        """Those that still read or write."""
        return [lane for voice in self.voices if not voice.is_over for lane in voice.lanes]

    @property
    def tells(self) -> bool:
        """Whether its text can be shown as it comes: a vote is over when all have said theirs."""
        return len(self.voices) == 1

    def conclude(self) -> tuple[str, Answer]:
        """What has not been shown yet, and the answer, once every voice is over: of a vote the majority's words."""
        if self.tells:
            return "", self.voices[0].writing.answer(self.team.routing)
        answers = [voice.writing.answer() for voice in self.voices]
        won = majority([answer.text for answer in answers], self.team.weights)
        routing = ((self.voices[won.member].name, won.share),)
        return answers[won.member].text, self.voices[won.member].writing.answer(routing)

    def start_alone(self) -> Generator[str, None, None]:
        """The pieces of an answer on a model of its own."""
        return write(self.team.models[0].loaded.model, self.voices[0].writing, self._cancelled.is_set)

    def _voices(self, limit: int, grammar: Grammar | None) -> list[Voice]:
        """A vote's voices draw noise of their own: in the n-th of several answers voice k that of row n·K + k."""
        ask, team = self.ask, self.team
        loaded, n_voices = team.models[0].loaded, len(team.models) if team.kind == "vote" else 1
        made: list[Voice] = []
        for number in range(n_voices):
            models = (team.models[number],) if n_voices > 1 else team.models
            place = ask.row * n_voices + number
            writing = Writing(
                loaded.base.tokenizer, self.prompt, ask.sampling, limit, loaded.ends, place, ask.n_logprobs
            )
            if grammar is not None:
                writing.guide = grammar.start(loaded.ends)
            voice = Voice(self, writing, models[0].served.name)
            if len(models) > 1:
                voice.weights, voice.over = team.weights, team.over
            voice.lanes = [Lane(voice, model) for model in models]
            made.append(voice)
        return made


def render(team: Team, ask: Ask) -> list[int]:
    """The prompt's ids, as the first of a team reads it. Raises Refusal as `prompt_of` does."""
    model = team.models[0]
    return prompt_of(ask, model.loaded.renderer, model.n_vocabulary, team.served.context)


def prompt_of(ask: Ask, renderer: Renderer, n_vocabulary: int, context: int) -> list[int]:
    """The prompt's ids. Raises Refusal for turns that the template does not write, for more than fit, and for a bias on
    tokens that are none.
    """
    try:
        prompt = renderer.prompt(ask.turns)
    except (DataError, BaseError) as wrong:
        raise Refusal(400, str(wrong), "invalid_value", "messages") from None
    try:
        ask.sampling.check_vocabulary(n_vocabulary)
    except InputError as wrong:
        raise Refusal(400, str(wrong), "invalid_value", "logit_bias") from None
    if len(prompt) >= context:
        raise Refusal(
            400,
            f"This model's maximum context length is {context} tokens, the answer included, and these messages have "
            f"{len(prompt)}. Leave out the oldest ones.",
            "context_length_exceeded",
            "messages",
        )
    return prompt
