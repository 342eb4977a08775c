"""The feedback tab: what the server stored of this visitor, to see, to take along, to delete."""

import json
from typing import Any

import gradio

from serve.ui.calls import Caller, Visitor
from serve.ui.texts import Trouble, text, told


class Opinions:
    """The tab's events: each gives the list and a status."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def see(self, key: str, conversation: str, request: gradio.Request) -> tuple[Any, str]:
        """The list as it is now."""
        return await self._look(Visitor(key, conversation), request, "")

    async def delete(
        self, data: gradio.EventData, key: str, conversation: str, request: gradio.Request
    ) -> tuple[Any, str]:
        """The list without one piece."""
        return await self._forget(Visitor(key, conversation), request, str(data._data["id"]))

    async def clear(self, key: str, conversation: str, request: gradio.Request) -> tuple[Any, str]:
        """The list once everything of the visitor's own is deleted."""
        return await self._forget(Visitor(key, conversation), request, None)

    async def export(self, key: str, conversation: str, request: gradio.Request) -> tuple[str, str]:
        """All of it as JSON lines, and a status."""
        try:
            items = await self._caller.stored(Visitor(key, conversation))
        except Trouble as trouble:
            return "", told(trouble, request)
        return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), ""

    async def _forget(self, visitor: Visitor, request: gradio.Request, id: str | None) -> tuple[Any, str]:
        try:
            await self._caller.forget(visitor, id)
        except Trouble as trouble:
            return gradio.skip(), told(trouble, request)
        return await self._look(visitor, request, text("deleted", request))

    async def _look(self, visitor: Visitor, request: gradio.Request, status: str) -> tuple[Any, str]:
        try:
            return {"items": await self._caller.stored(visitor), "off": False}, status
        except Trouble as trouble:
            if trouble.code == "feedback_off":
                return {"items": [], "off": True}, ""
            return {"items": [], "off": False}, told(trouble, request)
