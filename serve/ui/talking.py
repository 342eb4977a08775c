"""What the chat does when the visitor acts: ask, edit, ask again, judge. The talk itself lives in the visitor's tab."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from typing import Any

import gradio

from serve.names import AUTO, MIX
from serve.ui.calls import Caller, Heard, Visitor, Wish, members_of
from serve.ui.texts import Trouble, text, told

Turn = dict[str, Any]
Talk = dict[str, Any]  # {turns: [Turn], busy}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_tokens", "seed")
_PLAIN = {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class Talking:
    """The chat's events. A status is a line of HTML below the talk."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def ask(self, said: str, talk: Any) -> tuple[str, Talk]:
        """Put what the visitor typed at the end of the talk, and empty the box."""
        turns = turns_of(talk)
        return "", talk_of([*turns, {"role": "user", "content": said.strip()}] if said.strip() else turns)

    async def edit(self, data: gradio.EventData, talk: Any) -> Talk:
        """The talk up to one of the visitor's turns, with its new words."""
        turns, place = turns_of(talk), int(data._data["turn"])
        return talk_of([*turns[:place], {"role": "user", "content": str(data._data["text"])}])

    async def again(self, talk: Any) -> Talk:
        """The talk without what followed the visitor's last words."""
        turns = turns_of(talk)
        while turns and turns[-1]["role"] != "user":
            turns.pop()
        return talk_of(turns)

    async def answer(
        self, request: gradio.Request, talk: Any, model: str, weights: Any, key: str, conversation: str, *sampling: Any
    ) -> AsyncIterator[tuple[Talk, str]]:
        """The talk with the next answer growing at its end. What cannot be answered leaves the talk as it is."""
        turns, status = turns_of(talk), ""
        if not turns or turns[-1]["role"] != "user":
            yield talk_of(turns), status
            return
        heard = Heard()
        yield talk_of(turns, is_busy=True), status
        try:
            wish = Wish(model or "", Visitor(key, conversation), weights or {}, chosen(sampling))
            async for heard in self._caller.stream(turns, wish):
                status = text("forgot", request) if heard.n_dropped else ""
                if heard.content:
                    yield talk_of([*turns, turn_of(heard)], is_busy=True), status
        except Trouble as trouble:
            status = told(trouble, request)
            yield talk_of([*turns, turn_of(heard)] if heard.content else turns), status
            return
        yield talk_of([*turns, turn_of(heard if heard.content else Heard("…"))]), status

    async def thumb(
        self, data: gradio.EventData, request: gradio.Request, talk: Any, key: str, conversation: str
    ) -> tuple[Any, str]:
        """Store that an answer is good or bad."""
        value = str(data._data["value"])
        more = {"kind": "thumb", "value": value}
        return await self._judge(data, request, talk, Visitor(key, conversation), more, {"thumb": value})

    async def correct(
        self, data: gradio.EventData, request: gradio.Request, talk: Any, key: str, conversation: str
    ) -> tuple[Any, str]:
        """Store what should have been said instead of an answer."""
        corrected = str(data._data["text"])
        more = {"kind": "correction", "corrected": corrected}
        return await self._judge(data, request, talk, Visitor(key, conversation), more, {"corrected": corrected})

    async def _judge(
        self,
        data: gradio.EventData,
        request: gradio.Request,
        talk: Any,
        visitor: Visitor,
        feedback: Mapping[str, Any],
        mark: Mapping[str, Any],
    ) -> tuple[Any, str]:
        turns, place = turns_of(talk), int(data._data["turn"])
        turn = turns[place]
        answer = {"content": turn["content"], "response_id": turn.get("id"), "model": turn.get("model")}
        before = [{"role": one["role"], "content": one["content"]} for one in turns[:place]]
        try:
            await self._caller.judge(visitor, {**feedback, "messages": before, "answer": answer})
        except Trouble as trouble:
            return gradio.skip(), told(trouble, request)
        turns[place] = {**turn, **mark}
        return talk_of(turns), text("thanks", request)


def turns_of(talk: Any) -> list[Turn]:
    """The turns of a talk as the browser sent it."""
    return [dict(turn) for turn in (talk or {}).get("turns", [])]


def talk_of(turns: list[Turn], is_busy: bool = False) -> Talk:
    """A talk as the browser shows it."""
    return {"turns": turns, "busy": is_busy}


def turn_of(heard: Heard) -> Turn:
    """An answer as a turn: its words, its id, and who gave it."""
    facts = asdict(heard)
    return {"role": "assistant", **{name: facts[name] for name in ("content", "id", "model", "weights")}}


def chosen(values: tuple[Any, ...]) -> dict[str, Any]:
    """The sampling controls as fields of a request; an empty one says nothing. Raises Trouble for a seed that is no
    whole number.
    """
    said = {name: value for name, value in zip(SAMPLING, values, strict=True) if value not in (None, "")}
    whole = ("top_k", "max_completion_tokens", "seed")
    try:
        return {name: int(value) if name in whole else value for name, value in said.items()}
    except ValueError:
        raise Trouble("", "bad_seed") from None


def choices_of(models: Mapping[str, Any], model: str | None) -> str | None:
    """Who answers: the model chosen before, where it is still there, else the first."""
    return model if model in models else next(iter(models), None)


def weights_of(models: Mapping[str, Any], weights: Any) -> dict[str, float]:
    """The sliders' weights: those set before, for who is still there; at first the two first names weigh the same."""
    names, before = members_of(models), weights or {}
    if any(name in before for name in names):
        return {name: float(before.get(name, 0.0)) for name in names}
    return {name: 0.5 if place < 2 else 0.0 for place, name in enumerate(names)}


def settings_of(models: Mapping[str, Any], model: str | None) -> list[Any]:
    """A model's own sampling, for all controls but the seed. A mixture has none of its own: what was set stays."""
    if model == MIX:
        return [gradio.skip()] * 6
    facts = models.get(model or "", {})
    own, room = facts.get("defaults", {}), max(2, facts.get("context", 1024))
    longest = gradio.update(value=min(own.get("max_tokens", 256), room), maximum=room)
    return [*[own.get(name, value) for name, value in _PLAIN.items()], longest]


def drawn_of(models: Mapping[str, Any]) -> list[str]:
    """Whom an arena can draw from: everybody but `auto` and `mix`."""
    return [name for name in models if name not in (AUTO, MIX)]
