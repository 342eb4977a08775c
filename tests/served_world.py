"""What tests of the serving engine share: models of a tiny stack whose prompts are numbers, and a way to ask them."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from serve.engines.contract import Ask, One, Reply, Served, Who
from serve.engines.models import Model
from serve.engines.rows import RowsEngine
from tests.combined_world import words
from toolkit.bundle import Run
from toolkit.combine.gate import Gate
from toolkit.combine.speaker import Spec
from toolkit.corpus.talk import Turn
from toolkit.loaded import LoadedRun
from toolkit.sampling import Sampling
from toolkit.stack.stack import Stack
from toolkit.writing import Answer

CONTEXT = 4000
GREEDY = Sampling(temperature=0.0, max_tokens=9)


class Numbers:
    """A renderer whose turns are token ids, written out."""

    template = "numbers"

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The ids of all turns."""
        return [int(word) for turn in turns for word in turn.content.split()]


def loaded(stack: Stack, name: str = "run") -> LoadedRun:
    """A run on the stack's base."""
    base: Any = SimpleNamespace(model=stack.base, tokenizer=words(), hash="b" * 64, context=CONTEXT, source="tiny")
    renderer: Any = Numbers()
    return LoadedRun(Run(Path(name)), {}, base, stack.base, renderer, {}, frozenset({2}), ())


def served(name: str, **more: Any) -> Served:
    """A name, described."""
    adapter = None if name == "base" else name
    return Served(name, adapter, "tiny", "b" * 64, f"hash of {name}", CONTEXT, "chat", {}, 1_700_000_000, **more)


def models_of(stack: Stack) -> dict[str, Model]:
    """The base, and every adapter of the stack under its own name."""
    run = loaded(stack)
    made = {"base": Model(served("base"), run, stack)}
    for name in stack.slots:
        n_prefix = stack.n_prefix(stack.owners([name]))[0]
        made[name] = Model(served(name), run, stack, name, n_prefix)
    return made


def combined(models: Mapping[str, Model], name: str, spec: Spec, **more: Any) -> Model:
    """A run whose members answer together."""
    members = tuple((member, spec.weights.get(member, 0.0)) for member in spec.members)
    own = served(name, combination=spec.kind, members=members)
    return replace(models["base"], served=replace(own, adapter=None), spec=spec, **more)


def gated_model(models: Mapping[str, Model], name: str, gate: Gate) -> Model:
    """A run whose gate weighs its members for every token."""
    return combined(models, name, Spec("gate", gate.how, gate.experts), gate=gate)


@contextmanager
def engine(models: Mapping[str, Model], **options: Any) -> Iterator[RowsEngine]:
    """An engine over models, closed afterwards."""
    made = RowsEngine(models, **options)
    try:
        yield made
    finally:
        made.close()


def ask(who: Who | str, prompt: Sequence[int], sampling: Sampling = GREEDY, **more: Any) -> Ask:
    """One request, its prompt in ids."""
    turns = (Turn("user", " ".join(map(str, prompt))),)
    return Ask("the-id", One(who) if isinstance(who, str) else who, turns, sampling, **more)


async def listened(reply: Reply) -> tuple[list[str], Answer]:
    """The pieces of a reply, and its answer, of which they are the text."""
    pieces = [piece async for piece in reply]
    assert "".join(pieces) == reply.answer.text
    return pieces, reply.answer


async def said(engine: RowsEngine, one: Ask) -> Answer:
    """The answer to a request."""
    return (await listened(await engine.submit(one)))[1]


def all_said(engine: RowsEngine, asks: Sequence[Ask]) -> list[Answer]:
    """The answers to requests that come at once."""

    async def run() -> list[Answer]:
        return await asyncio.gather(*(said(engine, one) for one in asks))

    return asyncio.run(run())


@dataclass
class Watched:
    """What a function was called with, before it was called."""

    inner: Callable[..., Any]
    calls: list[tuple[Any, ...]]

    def __call__(self, *given: Any) -> Any:
        self.calls.append(given)
        return self.inner(*given)


def watch(holder: Any, name: str) -> list[tuple[Any, ...]]:
    """The calls of a method from now on."""
    watched = Watched(getattr(holder, name), [])
    setattr(holder, name, watched)
    return watched.calls
