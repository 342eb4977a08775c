"""What the server tells Prometheus, and its log."""

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from serve.api import Bounds, create_app
from serve.engines.contract import Load
from serve.logs import write_json

CHAT = "/v1/chat/completions"
ASK = {"model": "casual", "messages": [{"role": "user", "content": "오늘 뭐 먹지?"}]}
MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"


@pytest.fixture
def client(engine: Any) -> Iterator[TestClient]:
    app = create_app(engine, Bounds(max_tokens=100, n_slots=8))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def samples(client: TestClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def value(client: TestClient, name: str, **labels: str) -> float:
    return samples(client).get((name, frozenset(labels.items())), 0.0)


def test_requests_are_counted_by_model_and_outcome(client: TestClient, engine: Any) -> None:
    client.post(CHAT, json=ASK)
    client.post(CHAT, json=ASK | {"stream": True})
    client.post(CHAT, json=ASK | {"model": "nobody"})
    engine.pieces = ["아", ZeroDivisionError()]
    client.post(CHAT, json=ASK)
    engine.drain(0)
    client.post(CHAT, json=ASK)
    found = {
        (model, outcome): value(client, "maltu_requests_total", route=CHAT, model=model, outcome=outcome)
        for model, outcome in [("casual", "ok"), ("", "refused"), ("casual", "failed"), ("casual", "unavailable")]
    }
    assert found == {
        ("casual", "ok"): 2.0,
        ("", "refused"): 1.0,
        ("casual", "failed"): 1.0,
        ("casual", "unavailable"): 1.0,
    }


def test_tokens_and_times_are_counted(client: TestClient) -> None:
    client.post(CHAT, json=ASK | {"n": 2})
    assert value(client, "maltu_tokens_total", model="casual", kind="prompt") == 7
    assert value(client, "maltu_tokens_total", model="casual", kind="answer") == 6
    assert value(client, "maltu_first_token_seconds_count", model="casual") == 2
    assert value(client, "maltu_between_tokens_seconds_count", model="casual") == 4


def test_labels_come_from_a_bounded_set(client: TestClient) -> None:
    for n in range(30):
        client.post(CHAT, json=ASK | {"model": f"mix:casual={n + 1},polite=1"})
        client.post(CHAT, json=ASK | {"model": f"nobody-{n}"})
        client.get(f"/v1/nope/{n}")
        client.get(f"/v1/models/nobody-{n}")
    models = {dict(labels).get("model") for name, labels in samples(client) if name == "maltu_requests_total"}
    routes = {dict(labels)["route"] for name, labels in samples(client) if name == "maltu_requests_total"}
    assert models <= {"", "mix"} and routes <= {CHAT, "other", "/v1/models/{name:path}", "/metrics"}


def test_the_engines_load_is_read_when_asked(client: TestClient, engine: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "load", lambda: Load("failing", 3, 4, 5, 600, 200, 7))
    wanted = {"maltu_running": 3, "maltu_waiting": 4, "maltu_failures_total": 5, "maltu_prompt_tokens_total": 600}
    wanted |= {"maltu_reused_tokens_total": 200, "maltu_cache_hits_total": 7, "maltu_slots": 8, "maltu_models": 3}
    assert {name: value(client, name) for name in wanted} == wanted
    assert value(client, "maltu_state", state="failing") == 1 and value(client, "maltu_state", state="ready") == 0


@pytest.mark.parametrize("file", ["dashboard.json", "alerts.yaml"])
def test_dashboard_and_alerts_ask_for_numbers_that_there_are(client: TestClient, engine: Any, file: str) -> None:
    client.post(CHAT, json=ASK)
    told = {name for name, _ in samples(client)}
    families = {name.removesuffix("_created") for name in told}
    labelled = {"maltu_changes_total", "maltu_feedback_total"}  # none has happened yet
    asked = set(re.findall(r"maltu_[a-z_]+", (MONITORING / file).read_text(encoding="utf-8")))
    assert len(asked) > 5 and asked <= families | labelled


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    write_json(stream)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # the test's own client
    yield stream
    logging.getLogger("httpx2").setLevel(logging.NOTSET)
    root.handlers[:] = before
    root.setLevel(level)


def test_log_lines_are_json_with_the_requests_id(client: TestClient, engine: Any, log: io.StringIO) -> None:
    response = client.post(CHAT, json=ASK)
    engine.refusal = ZeroDivisionError("안에서")
    broken = client.post(CHAT, json=ASK)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    ids = [line["request_id"] for line in lines]
    assert ids == [response.headers["x-request-id"], *[broken.headers["x-request-id"]] * 2]
    first, trace, _ = lines
    assert (first["path"], first["status"], first["model"], first["outcome"]) == (CHAT, 200, "casual", "ok")
    assert "ZeroDivisionError" in trace["exception"] and trace["level"] == "error"


def test_what_is_said_and_keys_are_not_logged(client: TestClient, log: io.StringIO) -> None:
    client.post(CHAT, json=ASK, headers={"authorization": "Bearer secret-of-mine"}, params={"token": "hidden"})
    assert log.getvalue() and not any(word in log.getvalue() for word in ("오늘", "김치", "secret-of-mine", "hidden"))


def test_a_path_cannot_write_a_line_of_its_own(client: TestClient, log: io.StringIO) -> None:
    client.get('/v1/x%0a{"status": 200}')
    (line,) = log.getvalue().splitlines()
    assert json.loads(line)["status"] == 404
