"""Load from outside, in a process of its own: `python benchmarks/serve_load.py` reads a job from standard input as JSON
and writes what it saw to standard output.

A job: {"port": …, "path": …, "clients": [[body, …], …], "changes": [{"after": …, "path": …, "body": …, "headers": …}]}:
every client sends its bodies one after the other on connections of its own, all clients at once. Changes (none where
not said) are requests of one more client, one after the other, each as soon as every client has heard so many pieces.

Seen: seconds of the whole; of every request its client, seconds until the first text, until the end, and of each piece
since the job began, tokens read and written (usage, where the server tells it, else pieces), and an error where there
was one; of every change its status and when it began and ended.
HTTP is written and read by hand, so that as little as possible of the machine goes to this side.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

Answer = tuple[int, AsyncIterator[bytes], asyncio.StreamWriter]


async def request(port: int, path: str, body: bytes, headers: dict[str, str]) -> Answer:
    """The status, and the parts of the answer's body as they come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    status = int((await reader.readline()).split()[1])
    is_chunked = False
    while (line := await reader.readline()).strip():
        is_chunked |= line.lower().replace(b" ", b"") == b"transfer-encoding:chunked\r\n"
    return status, parts(reader, is_chunked), writer


async def parts(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncIterator[bytes]:
    """A body, piece by piece."""
    while True:
        if not is_chunked:
            if not (part := await reader.read(65536)):
                return
        else:
            size = int((await reader.readline()).split(b";")[0], 16)
            part = await reader.readexactly(size)
            await reader.readexactly(2)
            if not size:
                return
        yield part


def text_of(event: dict[str, Any]) -> str:
    """The text that came with an event of a stream, of a chat's or of a completion's."""
    found = [choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in event["choices"]]
    return "".join(found)


class Job:
    """What is asked, and what was heard of it so far: for each client the times of all its pieces."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.port, self.path, self.clients = job["port"], job["path"], job["clients"]
        self.changes = job.get("changes", [])
        self.since = time.perf_counter()
        self.heard: list[list[float]] = [[] for _ in self.clients]

    def now(self) -> float:
        """Seconds since the job began."""
        return time.perf_counter() - self.since

    async def one(self, number: int, body: dict[str, Any]) -> dict[str, Any]:
        """One request, timed."""
        payload, heard = json.dumps(body).encode(), self.heard[number]
        since, before, told, rest, text = self.now(), len(heard), dict[str, int](), b"", []
        status, body_parts, writer = await request(self.port, self.path, payload, {})
        async for part in body_parts:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if event.get("choices") and (piece := text_of(event)):
                    heard.append(self.now())
                    text.append(piece)
                told = event.get("usage") or told
        took, at = self.now() - since, heard[before:]
        writer.close()
        seen = {"first_s": at[0] - since if at else took, "took_s": took, "at_s": at, "text": "".join(text)}
        seen |= {"tokens": told.get("completion_tokens") or len(at), "read": told.get("prompt_tokens")}
        return seen if status == 200 and at else seen | {"error": f"{status} {rest[:200]!r}"}

    async def client(self, number: int) -> list[dict[str, Any]]:
        """All requests of one client."""
        seen: list[dict[str, Any]] = []
        for body in self.clients[number]:
            try:
                seen.append({"client": number} | await self.one(number, body))
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                nothing = {"first_s": 0.0, "took_s": 0.0, "at_s": [], "text": "", "tokens": 0, "read": None}
                seen.append({"client": number} | nothing | {"error": f"{type(error).__name__}: {error}"})
        return seen

    async def changing(self, seen: list[dict[str, Any]]) -> None:
        """The changes, each when its time has come."""
        for change in self.changes:
            while min(len(heard) for heard in self.heard) < change["after"]:
                await asyncio.sleep(0.005)
            began = self.now()
            body = json.dumps(change["body"]).encode()
            status, body_parts, writer = await request(self.port, change["path"], body, change["headers"])
            said = b"".join([part async for part in body_parts])
            writer.close()
            told = {"path": change["path"], "status": status, "began_s": began, "ended_s": self.now()}
            seen.append(told if status == 200 else told | {"error": said[:200].decode(errors="replace")})

    async def run(self) -> dict[str, Any]:
        """The whole job."""
        changes: list[dict[str, Any]] = []
        changing = asyncio.create_task(self.changing(changes))
        seen = await asyncio.gather(*(self.client(number) for number in range(len(self.clients))))
        took = self.now()
        if len(changes) < len(self.changes):  # it came too late, or still waits for an answer
            await asyncio.wait([changing], timeout=5.0)
            changing.cancel()
        return {"wall_s": took, "requests": [one for own in seen for one in own], "changes": changes}


async def main() -> None:
    """Read, run, write."""
    sys.stdout.write(json.dumps(await Job(json.load(sys.stdin)).run()))


if __name__ == "__main__":
    asyncio.run(main())
