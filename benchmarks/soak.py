"""A server under mixed load for minutes: does it answer everybody once, with the right adapter, and stay as large.

python benchmarks/soak.py [--minutes 10] [--clients 64]     (`make soak` is this, with --minutes 10)

A server of its own with 8 runs whose answers are one marker each, said over and over, two LoRA runs and a prefix run
whose greedy answers were noted before the load began; 64 clients chat, stream, hang up in the middle of a stream, send
what is wrong, mix and vote, and one reloads, unloads and loads runs through the admin's routes. One of the runs has
another marker each time it is reloaded. Ends with 1 where

- an answer holds another adapter's words, or a greedy one differs from what was noted; an answer of the run that
  changes holds two markers, or one that began after a reload the old one;
- a status is 5xx, but a 503 that says when to come again, or a wrong request's is not the expected 4xx;
- a request that was not hung up has no answer, an id answers twice, header and body disagree on it, or the log does not
  tell of it once;
- anything of all that never happened;
- the server's memory of the last two minutes is above 1.05 of that of minutes 3 and 4 (runs of 6 minutes and more).
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

import httpx
import psutil
from machine import say, surroundings
from serve_world import MARKERS, ROOT, free_port, maltu, marking_adapter, noise_adapter, open_base, running, write_run

LUNCH = "오늘 뭐 먹지?"
PROMPTS = (LUNCH, "비 온다", "시험 망했어", "what's for lunch", "i'm so tired", "주말에 뭐 해?")
GREEDY = ("lora0", "lora1", "prefix0", "base")
Sizes = list[tuple[float, float]]  # seconds since the beginning, MB
COMING = "mark7"  # comes and goes
TURNING, TURNS = "turning", MARKERS[:2]  # changes its marker when it is reloaded
GROWTH = 1.05
WRONG: tuple[tuple[bytes, int], ...] = (
    (b"{", 400),
    (b'{"model": "mark0"}', 400),
    (b'{"model": "nobody", "messages": [{"role": "user", "content": "a"}]}', 404),
    (b'{"model": "mark0", "messages": [], "n": 1000000}', 400),
    (b'{"model": "mark0", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400),
    (b'{"model": "mix:mark0=0.5,nobody=0.5", "messages": [{"role": "user", "content": "a"}]}', 404),
    (b'{"model": "mark0", "messages": [{"role": "user", "content": "' + b"a b " * 3000 + b'"}]}', 400),
    (b"[" * 5000, 400),
)


class Soak:
    """What the clients share. wrong: everything that may not happen, in words. noted: greedy answers by model and
    prompt, as they are without any load. turned: the marker of the run that changes, None while it does; n_turns: how
    often it began to.
    """

    def __init__(self, client: httpx.AsyncClient, admin: dict[str, str], runs: Path) -> None:
        self.client, self.admin, self.runs, self.until = client, admin, runs, 0.0
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.noted: dict[tuple[str, str], str] = {}
        self.turned: str | None = TURNS[0]
        self.n_turns = 0

    def check_id(self, response: httpx.Response, body_id: str | None) -> None:
        """An id answers once, and says the same in header and body."""
        own = response.headers.get("x-request-id", "")
        self.ids[own] += 1
        if not own or self.ids[own] > 1:
            self.wrong.append(f"the id {own!r} answered {self.ids[own]} times")
        if body_id is not None and not body_id.endswith(own):
            self.wrong.append(f"{own} in the header, {body_id} in the body")

    def is_answered(self, response: httpx.Response, what: str, expected: Collection[int] = (200,)) -> bool:
        """Whether there is an answer; busy ones are right where they say when to come again. What is none has its id
        checked here.
        """
        status = response.status_code
        self.counts[f"{what} {status}"] += 1
        is_busy = status in (429, 503) and "retry-after" in response.headers
        if status not in expected and not is_busy:
            self.wrong.append(f"{what}: status {status}: {response.text[:300]}")
        if status != 200:
            self.check_id(response, None)
        return status == 200

    async def ask(self, what: str, body: dict[str, Any], expected: Collection[int] = (200,)) -> str | None:
        """The text of a whole answer; None where there is none."""
        response = await self.client.post("/v1/chat/completions", json=body)
        if not self.is_answered(response, what, expected):
            return None
        answer = response.json()
        self.check_id(response, answer["id"])
        return str(answer["choices"][0]["message"]["content"])


def chat(model: str, prompt: str, **more: Any) -> dict[str, Any]:
    """A request."""
    return {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 16, **more}


def is_marked(text: str, markers: str) -> bool:
    """Whether a text is made of these markers alone, and of something."""
    return bool(text) and set(text) <= set(markers)


async def marked(soak: Soak, dice: random.Random) -> None:
    """A chat with a marked run, sampled."""
    number = dice.randrange(len(MARKERS))
    name = f"mark{number}"
    body = chat(name, dice.choice(PROMPTS), temperature=dice.choice((0.0, 0.7, 1.0)), max_tokens=dice.randrange(2, 40))
    text = await soak.ask("marked", body, (200, 404) if name == COMING else (200,))
    if text is not None and not is_marked(text, MARKERS[number]):
        soak.wrong.append(f"{name} said {text[:80]!r}")


async def noted(soak: Soak, dice: random.Random) -> None:
    """A greedy chat whose answer is known."""
    model, prompt = dice.choice(list(soak.noted))
    text = await soak.ask("noted", chat(model, prompt, temperature=0))
    if text is not None and text != soak.noted[model, prompt]:
        soak.wrong.append(f"{model} on {prompt!r} said {text[:80]!r}, and alone {soak.noted[model, prompt][:80]!r}")


async def turning(soak: Soak, dice: random.Random) -> None:
    """A chat with the run that changes: whole in one of its voices, in the new one if it began after the change."""
    expected, n_turns = soak.turned, soak.n_turns
    text = await soak.ask("turning", chat(TURNING, dice.choice(PROMPTS), max_tokens=dice.randrange(2, 40)))
    if text is None:
        return
    may_be = [expected] if expected is not None and soak.n_turns == n_turns else TURNS
    if not any(is_marked(text, marker) for marker in may_be if marker is not None):
        soak.wrong.append(f"{TURNING} said {text[:80]!r}, not {' or '.join(map(str, may_be))} alone")


async def together(soak: Soak, dice: random.Random) -> None:
    """A mixture, or a vote, of marked runs; two of three agree never, so the first one wins a vote."""
    first, second, third = dice.sample(range(len(MARKERS) - 1), 3)
    if dice.random() < 0.7:
        own = {"mix": {f"mark{first}": 0.6, f"mark{second}": 0.4}, "over": "prob"}
        text = await soak.ask("mixture", chat("mix", LUNCH, maltu=own, temperature=0.7))
        markers = MARKERS[first] + MARKERS[second]
    else:
        own_vote = {"vote": [f"mark{number}" for number in (first, second, third)]}
        text = await soak.ask("vote", chat("vote", LUNCH, maltu=own_vote))
        markers = MARKERS[first]
    if text is not None and not is_marked(text, markers):
        soak.wrong.append(f"together: {markers} said {text[:80]!r}")


async def streamed(soak: Soak, dice: random.Random) -> None:
    """A stream, heard to its end or cut off."""
    number = dice.randrange(len(MARKERS) - 1)
    is_cut = dice.random() < 0.5
    body = chat(f"mark{number}", dice.choice(PROMPTS), stream=True, max_tokens=dice.randrange(8, 60))
    async with soak.client.stream("POST", "/v1/chat/completions", json=body) as response:
        what = "cut off" if is_cut else "streamed"
        if response.status_code != 200:
            await response.aread()
            soak.is_answered(response, what)
            return
        soak.counts[f"{what} 200"] += 1
        text, last, own_id = "", "", None
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            last = line[6:]
            if last == "[DONE]":
                break
            event = json.loads(last)
            if "error" in event:
                soak.wrong.append(f"{what}: {last[:200]}")
                return
            own_id = event["id"]
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if is_cut and len(text) >= 3:
                break
        soak.check_id(response, own_id)
        if not is_marked(text, MARKERS[number]):
            soak.wrong.append(f"mark{number} streamed {text[:80]!r}")
        if not is_cut and last != "[DONE]":
            soak.wrong.append(f"a stream ended with {last[:80]!r}")


async def bad(soak: Soak, dice: random.Random) -> None:
    """A request that has to be refused."""
    body, expected = dice.choice(WRONG)
    headers = {"content-type": "application/json"}
    response = await soak.client.post("/v1/chat/completions", content=body, headers=headers)
    soak.is_answered(response, "wrong", (expected,))


KINDS: tuple[tuple[Callable[[Soak, random.Random], Coroutine[Any, Any, None]], int], ...] = (
    (marked, 5), (noted, 4), (streamed, 5), (turning, 2), (together, 3), (bad, 2),
)  # fmt: skip


async def client(soak: Soak, number: int) -> None:
    """One client, until time is up."""
    dice = random.Random(number)
    kinds, weights = zip(*KINDS, strict=True)
    while time.monotonic() < soak.until:
        (kind,) = dice.choices(kinds, weights)
        try:
            await kind(soak, dice)
        except (httpx.HTTPError, ValueError, KeyError) as error:  # nothing, or nothing that can be read
            soak.wrong.append(f"{kind.__name__}: no answer ({type(error).__name__}: {error})")
        await asyncio.sleep(dice.random() * 0.05)


async def changing(soak: Soak) -> None:
    """Runs are reloaded while they answer, one as another, and one comes and goes."""
    steps = itertools.cycle(
        [("reload", "mark0"), ("unload", COMING), ("reload", TURNING), ("reload", "lora0"), ("load", COMING),
         ("reload", "prefix0")]
    )  # fmt: skip
    is_away = False
    while time.monotonic() < soak.until or is_away:
        verb, run = next(steps)
        coming = TURNS[(soak.n_turns + 1) % len(TURNS)]
        if run == TURNING:
            soak.turned, soak.n_turns = None, soak.n_turns + 1
            old, new = soak.runs / TURNING / "adapters", soak.runs / f".{coming}" / "adapters"
            old.rename(soak.runs / f".{TURNS[TURNS.index(coming) - 1]}" / "adapters")
            new.rename(old)
        response = await soak.client.post(f"/admin/{verb}", json={"run": run}, headers=soak.admin)
        if soak.is_answered(response, verb):
            soak.check_id(response, None)
        else:
            soak.wrong.append(f"{verb} {run}: {response.status_code} {response.text[:200]}")
        if run == TURNING:
            soak.turned = coming
        is_away = (verb, run) == ("unload", COMING) or (is_away and verb != "load")
        await asyncio.sleep(1.0)


async def watching(soak: Soak, pid: int, sizes: Sizes) -> None:
    """The server's memory in MB, every second."""
    process, since = psutil.Process(pid), time.monotonic()
    while time.monotonic() < soak.until:
        sizes.append((time.monotonic() - since, process.memory_info().rss / 2**20))
        await asyncio.sleep(1.0)


async def soaked(
    address: str, pid: int, admin: str, runs: Path, asked: argparse.Namespace
) -> tuple[Soak, list[tuple[float, float]]]:
    """The whole load, and what came of it."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=asked.clients)
    sizes: Sizes = []
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits, trust_env=False) as http:
        soak = Soak(http, {"authorization": f"Bearer {admin}"}, runs)
        for model, prompt in itertools.product(GREEDY, PROMPTS):
            soak.noted[model, prompt] = await soak.ask("before", chat(model, prompt, temperature=0)) or ""
        if len({soak.noted[model, LUNCH] for model in GREEDY}) < len(GREEDY):
            soak.wrong.append("two adapters say the same, so the wrong one would not be noticed")
        soak.until = time.monotonic() + 60 * asked.minutes
        load = [client(soak, number) for number in range(asked.clients)]
        await asyncio.gather(*load, changing(soak), watching(soak, pid, sizes))
        for _ in range(50):  # who hung up last is noticed within a step
            idle = (await http.get("/readyz")).json()
            if not idle["running"]:
                break
            await asyncio.sleep(0.1)
        if (idle["running"], idle["waiting"], idle["failures"], idle["status"]) != (0, 0, 0, "ready"):
            soak.wrong.append(f"afterwards /readyz says {idle}")
    return soak, sizes


def untold(soak: Soak, log: str) -> list[str]:
    """What the server's own log says of it all: errors, and requests that it does not tell of once."""
    wrong, told = [], Counter[str]()
    for line in log.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if said.get("level") in ("error", "critical"):
            wrong.append(f"an error in the log: {line[:300]}")
        if said.get("message") == "request":
            told[said.get("request_id", "")] += 1
    odd = [own for own in soak.ids if told[own] != 1]
    return wrong + [f"the log tells {told[own]} times of the request {own}" for own in odd]


def missing(soak: Soak) -> list[str]:
    """What should have happened and never did."""
    kinds = ("marked", "noted", "streamed", "cut off", "turning", "mixture", "vote", "reload", "unload", "load")
    wanted = [f"{kind} 200" for kind in kinds] + [f"wrong {status}" for status in {status for _, status in WRONG}]
    return [f"never happened: {what}" for what in wanted if not soak.counts[what]]


def grown(sizes: Sizes, minutes: float) -> tuple[float, str | None]:
    """Memory of the last two minutes by that of minutes 3 and 4, and what is wrong with it. Short runs are not judged:
    the first minutes fill caches that have a bound.
    """
    early = [size for at, size in sizes if (120 <= at < 240 if minutes >= 6 else at >= 30 * minutes)]
    late = [size for at, size in sizes if at >= 60 * minutes - 120]
    ratio = statistics.median(late or [0.0]) / statistics.median(early or [1.0])
    is_wrong = minutes >= 6 and ratio > GROWTH
    return ratio, f"memory grew to {ratio:.3f} of what it was, more than {GROWTH}" if is_wrong else None


def main() -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    asked = parser.parse_args()
    say(str(surroundings(("torch", "transformers"))))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base, names = open_base("spoken-mini", folder), []
        for number, marker in enumerate(MARKERS):
            write_run(folder / "runs" / f"mark{number}", base, marking_adapter(base, marker))
            names.append(f"mark{number}")
        for marker, run in ((TURNS[0], TURNING), (TURNS[1], f".{TURNS[1]}")):
            write_run(folder / "runs" / run, base, marking_adapter(base, marker))
        (folder / "runs" / f".{TURNS[0]}").mkdir()
        names.append(TURNING)
        for number, kind in enumerate(("lora", "lora", "prefix")):
            names.append(f"{kind}{number % 2}")
            write_run(folder / "runs" / names[-1], base, noise_adapter(base, kind, number))
        words = [sys.executable, "-m", "serve", "key", "new", "--name", "soak", "--file", str(folder / "admin")]
        admin = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        port = free_port()
        more = ("--admin-key-file", str(folder / "admin"), "--slots", "32", "--queue", "64", "--store", "none")
        with running(maltu(folder / "runs", names, port, *more), port, folder / "log.txt", "/readyz") as server:
            soak, sizes = asyncio.run(soaked(server.address, server.process.pid, admin, folder / "runs", asked))
        if server.process.returncode != 0:
            soak.wrong.append(f"the server ended with {server.process.returncode}")
        soak.wrong += untold(soak, server.log.read_text(encoding="utf-8", errors="replace")) + missing(soak)
    ratio, too_large = grown(sizes, asked.minutes)
    soak.wrong += [too_large] if too_large else []
    for what, count in sorted(soak.counts.items()):
        say(f"{what:<16} {count}")
    say(f"{len(soak.ids)} ids; memory {sizes[0][1]:.0f} MB at first, {sizes[-1][1]:.0f} at last, ratio {ratio:.3f}")
    for line, count in Counter(soak.wrong).most_common(20):
        say(f"WRONG ({count}): {line}")
    say("soaked: nothing wrong" if not soak.wrong else f"soaked: {len(soak.wrong)} things wrong")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
