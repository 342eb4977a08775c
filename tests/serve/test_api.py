"""The routes over an engine that says what it is told: OpenAI's shapes, bounds, keys, errors that name themselves."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from serve.api import Bounds, create_app
from serve.engines.contract import Load
from serve.keys import key_of
from serve.refusal import Refusal, failed, queue_full

URL = "/v1/chat/completions"
ASK = {"model": "casual", "messages": [{"role": "user", "content": "오늘 뭐 먹지?"}]}
KEY = "a-key-of-sixteen-characters"


@pytest.fixture
def client(engine: Any) -> Iterator[TestClient]:
    with TestClient(create_app(engine, Bounds(max_tokens=100)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def locked(engine: Any) -> Iterator[TestClient]:
    app = create_app(engine, Bounds(100, (key_of("another-key-of-sixteen"), key_of(KEY, "app"))), has_page=True)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def test_an_answer_has_the_shape_of_openai(client: TestClient) -> None:
    response = client.post(URL, json=ASK | {"user": "kim"})
    answer = response.json()
    assert response.status_code == 200 and answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "아무거나 먹자.", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    told = {"adapter": "casual", "routing": None, "weights_hash": "a" * 64, "unused": ["user"]}
    assert answer["maltu"] == told
    assert answer["id"] == f"chatcmpl-{response.headers['x-request-id']}"


def test_a_streamed_answer_has_the_shape_of_openai(client: TestClient) -> None:
    response = client.post(URL, json=ASK | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events_of(response.text)
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["total_tokens"] == 10
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "아무거나 먹자."
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert chunks[0]["maltu"] == chunks[-1]["maltu"] and all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{response.headers['x-request-id']}"}


def test_a_stream_without_usage_ends_with_the_finish_reason(client: TestClient) -> None:
    *_, last, done = events_of(client.post(URL, json=ASK | {"stream": True}).text)
    assert done == "[DONE]" and last["choices"][0]["finish_reason"] == "stop" and "usage" not in last


def test_the_engine_gets_what_was_asked(client: TestClient, engine: Any) -> None:
    system = {"role": "developer", "content": "짧게 답해."}
    asked = {"temperature": 0, "top_p": 0, "max_tokens": 5, "stop": "끝", "seed": 3}
    client.post(URL, json=ASK | asked | {"messages": [system, *ASK["messages"]]})  # type: ignore[misc]
    ask = engine.asks[0]
    assert [(turn.role, turn.content) for turn in ask.turns] == [("system", "짧게 답해."), ("user", "오늘 뭐 먹지?")]
    sampling = ask.sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.stop, sampling.seed) == (0, 5, ("끝",), 3)
    assert 0 < sampling.top_p < 1e-3


def test_what_is_not_asked_is_the_runs_own(client: TestClient, engine: Any) -> None:
    client.post(URL, json=ASK), client.post(URL, json=ASK)
    first, second = (ask.sampling for ask in engine.asks)
    assert (first.temperature, first.top_p, first.max_tokens) == (0.5, 0.8, 20)
    assert first.seed != second.seed


def test_models_lists_base_and_runs(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [entry["id"] for entry in listed["data"]] == ["base", "casual", "polite"]
    assert listed["data"][0]["maltu"]["kind"] == "base" and listed["data"][1]["maltu"]["state"] == "ready"
    assert client.get("/v1/models/casual").json() == listed["data"][1]
    assert client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"


def test_models_say_whether_their_base_is_in_eight_bits(
    client: TestClient, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_int8 in (False, True):
        monkeypatch.setattr(type(engine), "is_int8", is_int8)
        entries = [*client.get("/v1/models").json()["data"], client.get("/v1/models/casual").json()]
        assert {entry["maltu"]["cpu_int8"] for entry in entries} == {is_int8}


def test_health_and_readiness(client: TestClient, engine: Any) -> None:
    assert client.get("/healthz").json() == {"status": "ok"} and client.get("/readyz").status_code == 200
    engine.drain(1.0)
    assert client.get("/healthz").status_code == 200 and client.get("/readyz").status_code == 503


def test_readiness_says_that_the_engine_fails(client: TestClient, engine: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "load", lambda: Load("ready", 1, 2, 3))
    assert client.get("/readyz").json() == {"status": "ready", "running": 1, "waiting": 2, "failures": 3}
    monkeypatch.setattr(engine, "load", lambda: Load("failing", 0, 0, 9))
    assert client.get("/readyz").status_code == 503 and client.get("/healthz").status_code == 200


def test_a_client_cannot_choose_the_request_id(client: TestClient) -> None:
    response = client.get("/healthz", headers={"x-request-id": "mine"})
    assert response.headers["x-request-id"] != "mine"


@pytest.mark.parametrize("streams", [False, True])
def test_a_full_queue_says_when_to_come_again(client: TestClient, engine: Any, streams: bool) -> None:
    engine.refusal = queue_full(64, 7)
    response = client.post(URL, json=ASK | {"stream": streams})
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_an_engine_that_breaks_is_a_500_with_an_id(client: TestClient, engine: Any) -> None:
    engine.pieces = ["아", failed("the-id")]
    response = client.post(URL, json=ASK)
    assert response.status_code == 500 and "the-id" in response.json()["error"]["message"]


def test_a_bug_is_a_500_with_an_id_and_no_traceback(client: TestClient, engine: Any) -> None:
    engine.refusal = ZeroDivisionError("secret")
    response = client.post(URL, json=ASK)
    error = response.json()["error"]
    assert response.status_code == 500 and error["code"] == "internal_error" and "secret" not in response.text
    assert response.headers["x-request-id"] in error["message"]


def test_a_stream_that_breaks_half_way_ends_with_the_error(client: TestClient, engine: Any) -> None:
    engine.pieces = ["아", Refusal(503, "stopping", "stopping")]
    *_, piece, last = events_of(client.post(URL, json=ASK | {"stream": True}).text)
    assert piece["choices"][0]["delta"] == {"content": "아"} and last["error"]["code"] == "stopping"


def test_a_key_opens_the_api(locked: TestClient) -> None:
    headers = {"authorization": f"bearer {KEY}"}
    assert locked.get("/v1/models", headers=headers).status_code == 200
    assert locked.post(URL, json=ASK, headers=headers).status_code == 200


def test_health_needs_no_key(locked: TestClient) -> None:
    assert locked.get("/healthz").status_code == 200 and locked.get("/readyz").status_code == 200


async def hang_up(app: Any, asked: dict[str, Any], engine: Any) -> None:
    """Send a request by hand, and leave while it is being answered."""
    left = asyncio.Event()
    body = [{"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if body:
            return body.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(event: Any) -> None:
        await asyncio.sleep(0)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST", "path": URL,
        "scheme": "http", "raw_path": URL.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "http_version": "1.1",
    }  # fmt: skip
    running = asyncio.create_task(app(scope, receive, send))
    while not engine.replies:
        await asyncio.sleep(0.01)
    left.set()
    await asyncio.wait_for(engine.replies[0].was_cancelled.wait(), 5.0)
    running.cancel()


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_cancels_its_answer(engine: Any, streams: bool) -> None:
    engine.pieces, engine.pace = ["음"] * 1000, 0.05
    asyncio.run(hang_up(create_app(engine, Bounds(100)), ASK | {"stream": streams}, engine))
    assert engine.replies[0].n_given < 10


def test_the_api_describes_its_request(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    body = described["paths"][URL]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/Chat"}
    properties = described["components"]["schemas"]["Chat"]["properties"]
    assert {"model", "messages", "max_completion_tokens"} <= set(properties)
