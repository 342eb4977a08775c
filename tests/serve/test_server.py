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

from serve.keys import new_key
from serve.store import Store, Which

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


def test_the_openai_client_gets_several_answers_with_log_probabilities(client: Any) -> None:
    asked = {"model": "polite", "messages": LUNCH, "seed": 5, "temperature": 1.5, "max_tokens": 8}
    several = client.chat.completions.create(**asked, n=3, logprobs=True, top_logprobs=2)
    alone = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in several.choices]
    assert texts[0] == alone.choices[0].message.content and len(set(texts)) == 3
    told = several.choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in told).decode(errors="replace").startswith(texts[0][:3])
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in told)


def test_the_openai_client_goes_on_with_running_text(client: Any) -> None:
    asked = {"model": "base", "prompt": "옛날 옛적에", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**asked)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    assert whole.choices[0].text == streamed != "" and whole.usage.completion_tokens <= 8


def test_a_mixture_with_all_the_weight_on_one_answers_as_it_does(client: Any) -> None:
    asked = {"messages": LUNCH, "temperature": 0, "max_tokens": 12}
    mixed = client.chat.completions.create(model="mix:polite=1,casual=0", **asked)
    alone = client.chat.completions.create(model="polite", **asked)
    assert mixed.choices[0].message.content == alone.choices[0].message.content
    assert mixed.model_extra["maltu"]["routing"]["kind"] == "mix"


def test_what_the_machine_reads_of_the_server_can_be_read(server: Any, client: Any) -> None:
    client.chat.completions.create(model="casual", messages=LUNCH, max_tokens=4)
    text = httpx.get(f"{server.address}/metrics").text
    assert 'maltu_requests_total{model="casual",outcome="ok",route="/v1/chat/completions"}' in text
    lines = [json.loads(line) for line in server.log.read_text(encoding="utf-8").splitlines()]
    assert lines and all("request_id" in line for line in lines if line["message"] == "request")


def test_the_openai_client_lists_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["base", "casual", "polite"]
    assert client.models.retrieve("polite").model_extra["maltu"]["kind"] == "run"


def test_the_openai_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="base, casual, polite") as missing:
        client.chat.completions.create(model="gpt-4o", messages=LUNCH)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model="casual", messages=LUNCH, parallel_tool_calls=True)
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "parallel_tool_calls")
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
    head = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
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
    assert "Traceback" not in log and '"level": "error"' not in log


def test_a_port_that_is_taken_is_an_error_before_anything_loads(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from serve.__main__ import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["casual", "--runs", str(runs), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err


def test_runs_come_and_go_and_feedback_stays(runs: Path, tmp_path: Path, start: Callable[..., Any]) -> None:
    admin = {"authorization": f"Bearer {new_key('root', tmp_path / 'admin')}"}
    place = f"sqlite:///{tmp_path}/feedback.db"
    words = ("--admin-key-file", str(tmp_path / "admin"), "--store", place, "--keep-conversations")
    one = start("casual", "--runs", str(runs), "--no-ui", *words, log=tmp_path / "log.txt")
    assert place in one.said and "/admin" in one.said
    with httpx.Client(base_url=one.address, timeout=30) as client:
        assert client.post("/admin/load", json={"run": "polite"}).status_code == 401
        assert client.post("/admin/load", json={"run": "polite"}, headers=admin).json()["models"][-1] == "polite"
        told = {"conversation": "conversation-0001"}
        asked = {"model": "mix:polite=0.5,casual=0.5", "messages": LUNCH, "max_tokens": 8, "maltu": told}
        said = client.post("/v1/chat/completions", json=asked).json()
        labels = client.post("/v1/classify", json={"model": "polite", "input": "좋아요", "labels": ["긍정", "부정"]})
        assert labels.json()["data"][0]["label"] in ("긍정", "부정")
        answer = {"content": said["choices"][0]["message"]["content"], "response_id": said["id"]}
        thumb = {"kind": "thumb", "messages": LUNCH, "answer": answer, "value": "up"} | told
        assert client.post("/v1/feedback", json=thumb).json()["known"]
        assert client.post("/admin/unload", json={"run": "polite"}, headers=admin).status_code == 200
        assert client.post("/v1/chat/completions", json=asked).status_code == 404
    one.process.kill()
    store = Store(place)
    (record,) = store.each()
    assert store.count(Which()) == (1, 1) and record.payload["answers"][0]["routing"]["weights"]["polite"] == 0.5
    store.close()


def test_an_api_key_file_locks_the_api(runs: Path, tmp_path: Path, start: Callable[..., Any]) -> None:
    key = new_key("app", tmp_path / "keys")
    keys = ("--api-key-file", str(tmp_path / "keys"))
    one = start("polite", "--runs", str(runs), "--no-ui", *keys, log=tmp_path / "log.txt")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{one.address}/v1", api_key="wrong").models.list()
    client = openai.OpenAI(base_url=f"{one.address}/v1", api_key=key, max_retries=0)
    assert client.chat.completions.create(model="polite", messages=LUNCH, max_tokens=4).choices
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert key not in "".join(lines) and json.loads(lines[-1])["key"] == "app"
