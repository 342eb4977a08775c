"""The arena: two models that the visitor cannot see answer the same words at once, and the vote names them.

Who is who stays in the server's own memory of the session until the vote; the browser is told the words alone.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import gradio

from serve.ui.calls import Caller, Heard, Visitor, Wish
from serve.ui.talking import Talk, Turn, talk_of, turn_of
from serve.ui.texts import Trouble, text, told

Winner = Literal["a", "b", "tie", "both_bad"]
_dice = random.SystemRandom()


@dataclass(frozen=True)
class Round:
    """One prompt, the names that were drawn and their whole answers, the left one first."""

    prompt: str
    names: tuple[str, str]
    answers: tuple[Heard, Heard]


class Arena:
    """The arena's events. A round is None while there is nothing to vote on."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def fight(
        self, request: gradio.Request, prompt: str, names: Sequence[str], key: str, conversation: str
    ) -> AsyncIterator[tuple[Any, ...]]:
        """The box, both sides as they grow, the round, four buttons, the status."""
        prompt = prompt.strip()
        if not prompt or len(names) < 2:
            status = text("too_few", request) if prompt else ""
            yield gradio.skip(), gradio.skip(), gradio.skip(), gradio.skip(), *votes(False), status
            return
        one, other = _dice.sample(list(names), 2)
        wishes = [Wish(name, Visitor(key, conversation)) for name in (one, other)]
        yield "", _side(prompt, Heard(), True), _side(prompt, Heard(), True), None, *votes(False), ""
        sides = [Heard(), Heard()]
        try:
            async for sides in self._both(prompt, wishes):
                yield gradio.skip(), *[_side(prompt, side, True) for side in sides], None, *votes(False), ""
        except Trouble as trouble:
            yield prompt, *[_side(prompt, side) for side in sides], None, *votes(False), told(trouble, request)
            return
        left, right = (side if side.content else _silent(side, request) for side in sides)
        done = Round(prompt, (one, other), (left, right))
        yield gradio.skip(), _side(prompt, left), _side(prompt, right), done, *votes(True), ""

    def voting(self, winner: Winner) -> Callable[..., Awaitable[tuple[Any, ...]]]:
        """What a button does: store that side as the better one.

        It gives both sides with their names, no round, four buttons, the status.
        """

        async def vote(request: gradio.Request, done: Round | None, key: str, conversation: str) -> tuple[Any, ...]:
            if done is None:
                return gradio.skip(), gradio.skip(), None, *votes(False), gradio.skip()
            left, right = done.answers
            pair = {"kind": "pair", "messages": [{"role": "user", "content": done.prompt}], "winner": winner}
            status = text("thanks", request)
            try:
                await self._caller.judge(Visitor(key, conversation), pair | {"a": left.said(), "b": right.said()})
            except Trouble as trouble:
                status = told(trouble, request)
            named = zip(done.answers, done.names, strict=True)
            shown = [_side(done.prompt, heard, name=name) for heard, name in named]
            return *shown, None, *votes(False), status

        return vote

    async def _both(self, prompt: str, wishes: Sequence[Wish]) -> AsyncIterator[list[Heard]]:
        """Both answers as they grow, asked at the same moment so that the engine writes them in one batch.

        Raises Trouble when either of them does; the other one is given up.
        """
        sides, news = [Heard() for _ in wishes], asyncio.Event()

        async def listen(place: int) -> None:
            async for heard in self._caller.stream([{"role": "user", "content": prompt}], wishes[place]):
                sides[place] = heard
                news.set()

        listening = [asyncio.create_task(listen(place)) for place in range(len(wishes))]
        for task in listening:
            task.add_done_callback(lambda _: news.set())
        try:
            is_over = False
            while not is_over:
                await news.wait()
                news.clear()
                is_over = all(task.done() for task in listening)  # before the sides are read: none grows after this
                for task in listening:
                    if task.done():
                        task.result()
                yield list(sides)
        finally:
            for task in listening:
                task.cancel()


def votes(are_open: bool) -> list[Any]:
    """The four buttons, to press or not."""
    return [gradio.update(interactive=are_open) for _ in get_args(Winner)]


def _side(prompt: str, heard: Heard, is_busy: bool = False, name: str | None = None) -> Talk:
    """What one side shows; without the name that was drawn only the words leave the server. Of a run that chose among
    its experts both are told, so that it is not taken for the expert itself.
    """
    shown: Turn = {"role": "assistant", "content": heard.content}
    if name is not None:
        shown = turn_of(heard) | {"model": name, "weights": heard.weights or {heard.model or name: 1.0}}
    turns = [{"role": "user", "content": prompt}]
    return talk_of([*turns, shown] if heard.content else turns, is_busy)


def _silent(heard: Heard, request: gradio.Request) -> Heard:
    return Heard(text("nothing", request), heard.id, heard.model, heard.weights)
