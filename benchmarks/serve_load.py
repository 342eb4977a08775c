"""Load from outside, in a process of its own: `python benchmarks/serve_load.py` reads a job from standard input as JSON
and writes what it saw to standard output.

A job: {"port": …, "path": …, "clients": [[body, …], …]}: every client sends its bodies one after the other on
connections of its own, all clients at once. Seen: seconds of the whole, and of every request its client, seconds until
the first text, until the end, tokens (usage, where the server tells it, else pieces), and an error where there was one.
HTTP is written and read by hand, so that as little as possible of the machine goes to this side.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any


async def request(port: int, path: str, body: bytes) -> tuple[int, AsyncIterator[bytes], asyncio.StreamWriter]:
    """The status, and the parts of the answer's body as they come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
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


async def one(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """One request, timed."""
    payload = json.dumps(body).encode()
    since, first, n_pieces, n_told, rest, text = time.perf_counter(), None, 0, None, b"", []
    status, body_parts, writer = await request(port, path, payload)
    async for part in body_parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("choices") and (piece := text_of(event)):
                first = first or time.perf_counter() - since
                n_pieces += 1
                text.append(piece)
            if event.get("usage"):
                n_told = event["usage"].get("completion_tokens")
    took = time.perf_counter() - since
    writer.close()
    seen = {"first_s": first or took, "took_s": took, "tokens": n_told or n_pieces, "text": "".join(text)}
    return seen if status == 200 and n_pieces else seen | {"error": f"{status} {rest[:200]!r}"}


async def client(job: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """All requests of one client."""
    seen = []
    for body in job["clients"][number]:
        try:
            seen.append({"client": number} | await one(job["port"], job["path"], body))
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            wrong = f"{type(error).__name__}: {error}"
            seen.append({"client": number, "first_s": 0.0, "took_s": 0.0, "tokens": 0, "text": "", "error": wrong})
    return seen


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """The whole job."""
    since = time.perf_counter()
    seen = await asyncio.gather(*(client(job, number) for number in range(len(job["clients"]))))
    return {"wall_s": time.perf_counter() - since, "requests": [one for own in seen for one in own]}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(run(json.load(sys.stdin)))))
