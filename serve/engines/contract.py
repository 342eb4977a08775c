"""What an engine does: takes turns, gives pieces of an answer as they come. Where tokens come from, the API knows not.

tests/serve/test_engine_contract.py is the conformance test; a new engine is done when it passes.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from toolkit.corpus.talk import Turn
from toolkit.generate import Answer, Sampling


@dataclass(frozen=True)
class Served:
    """A name that answers.

    adapter: what acts on the base there, None for the base alone. defaults: the run's own sampling (temperature, top_p,
    max_tokens, …). context: tokens of prompt and answer together. created: seconds since 1970.
    """

    name: str
    adapter: str | None
    base: str
    base_hash: str
    weights_hash: str
    context: int
    task: str
    defaults: Mapping[str, Any]
    created: int


@dataclass(frozen=True)
class Ask:
    """One request: the turns so far, who answers, and how tokens are chosen. id: the request's, for the log."""

    id: str
    model: str
    turns: tuple[Turn, ...]
    sampling: Sampling


State = Literal["ready", "failing", "draining", "stopped"]


@dataclass(frozen=True)
class Load:
    """How busy an engine is, and how many answers failed inside it since it started.

    `stopped` engines answer nothing any more; `draining` ones finish what they have; `failing` ones still try, but one
    answer after the other broke a moment ago.
    """

    state: State
    n_running: int
    n_waiting: int
    n_failures: int = 0


class Reply(ABC):
    """An answer on its way. Iterating gives text pieces that join to it; afterwards `answer` is there.

    A piece never splits a character. Iterating raises Refusal when the engine gives up on it.
    """

    n_prompt: int

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[str]:
        """The pieces, once."""

    @property
    @abstractmethod
    def answer(self) -> Answer:
        """The whole answer. Only after the last piece."""

    @abstractmethod
    def cancel(self) -> None:
        """Nobody listens any more: stop within one step. Harmless afterwards, and from any thread."""


class Engine(ABC):
    """Answers for several names on one base.

    Everything but `submit` returns at once; nothing blocks the event loop. What an ask may hold is checked before it
    comes here; its prompt's length is the engine's to know.
    """

    @abstractmethod
    def models(self) -> Mapping[str, Served]:
        """Every name that answers, in the order it was given."""

    @abstractmethod
    async def submit(self, ask: Ask) -> Reply:
        """Take a request in. `ask.model` is one of `models`.

        Raises Refusal: 429 when too many wait, 503 when the engine stops, 400 context_length_exceeded when the prompt
        leaves no room to answer, 400 when the template does not write such turns.
        """

    @abstractmethod
    def load(self) -> Load:
        """How busy it is now."""

    @abstractmethod
    def drain(self, limit_s: float) -> None:
        """Take nothing new in; give up with 503 on what is not finished after `limit_s`."""

    @abstractmethod
    def close(self) -> None:
        """Stop now, and give up with 503 on what is left. May be called twice."""
