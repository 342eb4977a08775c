"""Processes that are killed: nothing that was acknowledged is lost, and a stop lets streams end."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.store import Store, Which

pytestmark = pytest.mark.slow  # processes of their own

ROOT = Path(__file__).parents[2]
LUNCH = [{"role": "user", "content": "오늘 뭐 먹지?"}]
ASK = {"model": "casual", "messages": LUNCH}
Start = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def run(pace_s: float = 0.0) -> tuple[subprocess.Popen[str], str]:
        words = [sys.executable, "-m", "tests.serve.scripted_server", f"sqlite:///{tmp_path}/feedback.db", str(pace_s)]
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
        started.append(process)
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http")
        return process, address

    yield run
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_what_was_acknowledged_outlives_kill_9_in_the_middle_of_writes(start: Start, tmp_path: Path) -> None:
    process, address = start()
    acknowledged: list[str] = []

    def write(worker: int) -> None:
        with httpx.Client(base_url=address, timeout=10) as client:
            for n in range(10_000):
                thumb = {"kind": "thumb", "messages": LUNCH, "answer": {"content": f"{worker} {n}"}, "value": "up"}
                try:
                    acknowledged.append(client.post("/v1/feedback", json=thumb).json()["id"])
                except httpx.TransportError:
                    return

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(write, worker) for worker in range(4)]
        while len(acknowledged) < 100:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        concurrent.futures.wait(writing)
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    stored = {record.id for record in store.each()}
    store.close()
    assert len(acknowledged) >= 100 and set(acknowledged) <= stored
    assert len(stored) <= len(acknowledged) + 4  # at most what each writer had on its way


def test_sigterm_in_the_middle_of_streams_lets_them_end(start: Start, tmp_path: Path) -> None:
    process, address = start(0.3)

    def follow(_: int) -> list[str]:
        with httpx.stream(
            "POST", f"{address}/v1/chat/completions", json=ASK | {"stream": True}, timeout=20
        ) as response:
            return [line for line in response.iter_lines() if line]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        following = list(pool.map(pool.submit, [follow] * 8, range(8)))
        time.sleep(0.6)
        process.terminate()
        streams = [one.result() for one in following]
    assert process.wait(timeout=20) in (0, -signal.SIGTERM)
    for lines in streams:
        assert lines[-1] == "data: [DONE]"
        said: list[Any] = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert "".join(one["choices"][0]["delta"].get("content", "") for one in said) == "아무거나 먹자."
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    assert store.count(Which()) == (0, 8)  # conversations are kept there
    store.close()
