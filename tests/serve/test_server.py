"""The server as its users meet it: a process on a port, asked by the openai client, by raw sockets, and by signals."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

pytestmark = pytest.mark.slow

LUNCH: list[Any] = [{"role": "user", "content": "오늘 뭐 먹지?"}]


@pytest.fixture
def client(server: Any) -> Any:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_start_lines_name_page_and_api(server: Any) -> None:
    assert f"{server.address}/\n" in server.said and f"{server.address}/v1" in server.said
    assert "base, casual, polite" in server.said


def test_the_openai_client_gets_an_answer(client: Any) -> None:
    answer = client.chat.completions.create(model="casual", messages=LUNCH, max_completion_tokens=16, user="kim")
    assert answer.choices[0].message.content and answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model_extra["maltu"]["unused"] == ["user"] and answer.model == "casual"


def test_the_openai_client_gets_a_stream_that_joins_to_the_answer(client: Any) -> None:
    asked = {"model": "polite", "messages": LUNCH, "seed": 5, "temperature": 1.0, "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    assert "\ufffd" not in text.rstrip("\ufffd")


def test_the_async_openai_client_is_answered_many_at_a_time(server: Any) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none") as client:

            async def one(model: str) -> str:
                stream = await client.chat.completions.create(model=model, messages=LUNCH, stream=True, max_tokens=12)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            assert all(await asyncio.gather(*(one(model) for model in ("base", "casual", "polite"))))

    asyncio.run(run())


def test_each_run_answers_with_its_own_adapter(client: Any) -> None:
    def said(model: str) -> Any:
        asked = {"model": model, "messages": LUNCH, "temperature": 0, "max_tokens": 12}
        return client.chat.completions.create(**asked).choices[0].message.content

    assert said("casual") == said("base") != said("polite")


def test_an_answer_of_the_client_can_be_sent_back(client: Any) -> None:
    first = client.chat.completions.create(model="casual", messages=LUNCH, max_tokens=8).choices[0].message
    again = client.chat.completions.create(
        model="casual", messages=[*LUNCH, first, {"role": "user", "content": "왜?"}], max_tokens=8
    )
    assert again.choices[0].message.content is not None


def test_the_openai_client_lists_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["base", "casual", "polite"]
    assert client.models.retrieve("polite").model_extra["maltu"]["kind"] == "run"


def test_the_openai_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="base, casual, polite") as missing:
        client.chat.completions.create(model="gpt-4o", messages=LUNCH)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model="casual", messages=LUNCH, n=3)
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "n")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="casual", messages=[{"role": "user", "content": "말 " * 5000}])
    assert long.value.code == "context_length_exceeded"


def busy(address: str) -> tuple[int, int]:
    said = httpx.get(f"{address}/readyz").json()
    return said["running"], said["waiting"]


def until_idle(address: str, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if busy(address) == (0, 0):
            return True
        time.sleep(0.05)
    return False


def open_request(address: str, body: dict[str, Any]) -> socket.socket:
    """A request on a socket of its own, that can be cut off."""
    place = urlsplit(address)
    connection = socket.create_connection((place.hostname, place.port), timeout=30)
    payload = json.dumps(body).encode()
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}".encode() + payload)
    return connection


LONG = {"model": "casual", "messages": LUNCH, "max_tokens": 480, "temperature": 2.0, "top_p": 1.0}


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_hangs_up_frees_its_place(server: Any, streams: bool) -> None:
    gone = [open_request(server.address, LONG | {"stream": streams}) for _ in range(6)]
    while sum(busy(server.address)) == 0:
        time.sleep(0.01)
    for connection in gone:
        connection.close()
    assert until_idle(server.address, 3.0)


def test_the_queue_is_bounded_and_says_when_to_come_again(server: Any) -> None:
    assert until_idle(server.address, 20.0)
    asked = [open_request(server.address, LONG | {"stream": True}) for _ in range(9)]
    heads = []
    for connection in asked:
        heads.append(connection.recv(4096).decode())
    refused = [head for head in heads if " 429 " in head.splitlines()[0]]
    for connection in asked:
        connection.close()
    assert len(refused) >= 1 and all("retry-after: " in head for head in refused)
    assert until_idle(server.address, 3.0)


def test_answers_do_not_block_the_rest_of_the_server(server: Any) -> None:
    asked = [open_request(server.address, LONG | {"stream": True}) for _ in range(2)]
    for _ in range(20):
        assert httpx.get(f"{server.address}/healthz", timeout=5).status_code == 200
    for connection in asked:
        connection.close()


def test_sigterm_finishes_what_runs_and_exits_with_0(runs: Path, tmp_path: Path, start: Callable[..., Any]) -> None:
    one = start("casual", "--runs", str(runs), "--no-ui", log=tmp_path / "log.txt")
    assert httpx.get(f"{one.address}/").status_code == 404
    asked = {"model": "casual", "messages": LUNCH, "max_tokens": 100, "temperature": 2.0, "top_p": 1.0, "stream": True}
    with httpx.stream("POST", f"{one.address}/v1/chat/completions", json=asked, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        since = time.monotonic()
        one.process.terminate()
        rest = "\n".join(lines)
    assert "data: [DONE]" in rest and "error" not in rest
    assert one.process.wait(timeout=30) == 0 and time.monotonic() - since < 10
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{one.address}/healthz")
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "Traceback" not in log and "ERROR" not in log


def test_a_port_that_is_taken_is_an_error_before_anything_loads(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from serve.__main__ import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["casual", "--runs", str(runs), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err


def test_an_api_key_file_locks_the_api(runs: Path, tmp_path: Path, start: Callable[..., Any]) -> None:
    (tmp_path / "keys").write_text("a-key-of-sixteen-characters\n", encoding="utf-8")
    keys = ("--api-key-file", str(tmp_path / "keys"))
    one = start("polite", "--runs", str(runs), "--no-ui", *keys, log=tmp_path / "log.txt")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{one.address}/v1", api_key="wrong").models.list()
    client = openai.OpenAI(base_url=f"{one.address}/v1", api_key="a-key-of-sixteen-characters", max_retries=0)
    assert client.chat.completions.create(model="polite", messages=LUNCH, max_tokens=4).choices
    assert "a-key-of" not in (tmp_path / "log.txt").read_text(encoding="utf-8")
