"""What an engine does: takes turns, gives pieces of an answer as they come. Where tokens come from, the API knows not.

tests/serve/test_engine_contract.py is the conformance test; a new engine is done when it passes.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.refusal import unsupported
from toolkit.bundle import Run
from toolkit.combine.mix import Over
from toolkit.corpus.talk import Turn
from toolkit.generate import Answer, Sampling, TokenLogprob


@dataclass(frozen=True)
class Served:
    """A name that answers.

    adapter: what acts on the base there, None for the base alone and for combinations. defaults: the run's own sampling
    (temperature, top_p, max_tokens, …). context: tokens of prompt and answer together. created: seconds since 1970.
    combination: how `members` answer as one (mix, vote, route, gate); None where one adapter does. members: names that
    answer by themselves too, with their weights.
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
    combination: str | None = None
    members: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class One:
    """The model of that name: a run (its combination, where it has one), RUN/EXPERT, or the base."""

    name: str

    def __str__(self) -> str:
        """As a request writes it."""
        return self.name


@dataclass(frozen=True)
class Mix:
    """Names with weights, mixed at every token (toolkit.combine.mix); the weights are made to sum to 1."""

    weights: tuple[tuple[str, float], ...]
    over: Over = "logprob"

    def __str__(self) -> str:
        """As a request writes it."""
        return "mix:" + ",".join(f"{name}={weight:g}" for name, weight in self.weights)


@dataclass(frozen=True)
class Vote:
    """Names that answer as wholes; the majority's words are the answer (toolkit.combine.vote)."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        """As a request writes it."""
        return "vote:" + ",".join(self.names)


@dataclass(frozen=True)
class Auto:
    """Whom a router picks by what is said."""

    def __str__(self) -> str:
        """As a request writes it."""
        return "auto"


Who = One | Mix | Vote | Auto


@dataclass(frozen=True)
class Ask:
    """One request: the turns so far, who answers, and how tokens are chosen. id: the request's, for the log.

    n_logprobs: None for none, 0 for the chosen token's log-probability alone, else how many likeliest ones beside it.
    row: the number of this answer among several to one request (`n`); it draws noise of its own. key: whose request it
    is (of an API key its hash, "" where none is needed): nothing computed for one key is used for another. schema: the
    JSON Schema, as toolkit.grammar.check_schema gives it, that an answer satisfies which ends by itself.
    """

    id: str
    who: Who
    turns: tuple[Turn, ...]
    sampling: Sampling
    n_logprobs: int | None = None
    row: int = 0
    key: str = ""
    schema: str | None = None

    @property
    def model(self) -> str:
        """Who answers, in the words of a request: for log lines."""
        return str(self.who)


State = Literal["ready", "failing", "draining", "stopped"]


@dataclass(frozen=True)
class Load:
    """How busy an engine is, and how many answers failed inside it since it started.

    `stopped` engines answer nothing any more; `draining` ones finish what they have; `failing` ones still try, but one
    answer after the other broke a moment ago. n_prompt: prompt tokens of all requests that were admitted, each member's
    of a combination counted; n_reused: those of them whose keys and values were there already, in n_hits requests.
    """

    state: State
    n_running: int
    n_waiting: int
    n_failures: int = 0
    n_prompt: int = 0
    n_reused: int = 0
    n_hits: int = 0


@dataclass
class Times:
    """How far an answer came when, in nanoseconds since 1970; None for what it did not come to.

    begun: it has a place among those that are computed. first: its first token is there.
    """

    asked: int = field(default_factory=time.time_ns)
    begun: int | None = None
    first: int | None = None
    over: int | None = None


class Reply(ABC):
    """An answer on its way. Iterating gives text pieces that join to it; afterwards `answer` is there.

    A piece never splits a character. Iterating raises Refusal when the engine gives up on it. served: who answers.
    times: where the engine says when.
    """

    n_prompt: int
    served: Served
    times: Times | None = None

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[str]:
        """The pieces, once."""

    @property
    @abstractmethod
    def answer(self) -> Answer:
        """The whole answer. Only after the last piece."""

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """Where they were asked for: those of the tokens so far, up to the last piece that was given."""
        return ()

    @abstractmethod
    def cancel(self) -> None:
        """Nobody listens any more: stop within one step. Harmless afterwards, and from any thread."""


class Engine(ABC):
    """Answers for several names on one base.

    Everything but `submit` returns at once; nothing blocks the event loop. What an ask may hold is checked before it
    comes here; its prompt's length is the engine's to know.
    """

    @property
    def computes(self) -> str:
        """What it computes with, in words for the lines at start; "" where there is nothing to say."""
        return ""

    @property
    def is_int8(self) -> bool:
        """Whether answers are computed with the base's weights in eight bits."""
        return False

    @abstractmethod
    def models(self) -> Mapping[str, Served]:
        """Every name that answers, in the order it was given."""

    @abstractmethod
    def served(self, who: Who) -> Served:
        """What answers such a request, described as one model; of a choice by a router, the choice as such.

        Raises Refusal: 404 for a name that is not in `models`; 400 for names that cannot answer together, weights that
        have no meaning, and `auto` where nothing chooses.
        """

    @abstractmethod
    async def submit(self, ask: Ask) -> Reply:
        """Take a request in.

        Raises Refusal: what `served` raises; 429 when too many wait, 503 when the engine stops, 400
        context_length_exceeded when the prompt leaves no room to answer, 400 when the template does not write such
        turns, for a logit_bias on a token that is none, and for a schema that cannot be followed here.
        """

    async def classify(
        self, who: Who, texts: Sequence[str], labels: Sequence[str] | None, key: str = ""
    ) -> tuple[Served, list[Mapping[str, float]]]:
        """Who answered, and for every text the probability of every label; they sum to 1. labels None: the run's own.

        A text stands in the words that the run was taught with (its template), where it has them. Raises Refusal: what
        `submit` raises; 400 where there are no labels, or for engines that do not do this.
        """
        raise unsupported("model", "This engine does not classify.")

    async def change(self, add: Run | None, remove: str | None) -> None:
        """Load a run, unload the one of a name, or both at once (reload); all of it or nothing.

        Nobody who is being answered notices: a request keeps the version it began with. Raises Refusal: 400 with the
        reason for a run that cannot be served here, 404 for a name that is no run's, and for engines that
        do not do this.
        """
        raise unsupported("run", "This engine does not load and unload runs while it answers. Start it again.")

    @abstractmethod
    def load(self) -> Load:
        """How busy it is now."""

    @abstractmethod
    def drain(self, limit_s: float) -> None:
        """Take nothing new in; give up with 503 on what is not finished after `limit_s`."""

    @abstractmethod
    def close(self) -> None:
        """Stop now, and give up with 503 on what is left. May be called twice."""
