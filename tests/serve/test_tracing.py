"""Traces: what stands in them, where they go, and that nobody waits for them."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from serve.api import Bounds, create_app
from serve.engines.contract import Times
from serve.engines.rows import RowsEngine
from serve.settings import read_settings
from serve.tracing import N_NOTED, Tracing, open_tracing
from tests.serve.conftest import stop_server
from toolkit.errors import InputError

export = pytest.importorskip("opentelemetry.sdk.trace.export", reason="needs the extra otel")
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "casual", "messages": [{"role": "user", "content": "오늘 비밀이 뭐야?"}]}
NAMES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@pytest.fixture
def kept() -> Any:
    """An exporter that keeps spans in memory."""
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


@pytest.fixture
def tracing(kept: Any) -> Iterator[Tracing]:
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(export.SimpleSpanProcessor(kept))
    yield Tracing(provider)
    provider.shutdown()


@pytest.fixture
def client(bare: Any, tracing: Tracing) -> Iterator[TestClient]:
    engine = RowsEngine(bare.models | {"lone": bare.alone["casual"]})
    with TestClient(create_app(engine, Bounds(100), tracing=tracing), raise_server_exceptions=False) as client:
        yield client
    engine.close()


def spans(kept: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for span in kept.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


@pytest.mark.parametrize("model", ["casual", "lone"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_spans_from_queue_to_last_token(client: TestClient, kept: Any, model: str, stream: bool) -> None:
    response = client.post(CHAT, json=ASK | {"model": model, "n": 2, "max_tokens": 6, "stream": stream})
    found = spans(kept)
    (root,) = found[CHAT]
    assert {name: len(some) for name, some in found.items()} == {CHAT: 1, "queue": 2, "prefill": 2, "decode": 2}
    told = dict(root.attributes)
    assert told["maltu.request_id"] == response.headers["x-request-id"]
    assert (told["maltu.model"], told["maltu.outcome"], told["http.route"]) == (model, "ok", CHAT)
    assert told["maltu.prompt_tokens"] > 3 and 2 <= told["maltu.answer_tokens"] <= 12
    for choice in range(2):
        own = [span for span in kept.get_finished_spans() if span.attributes.get("maltu.choice") == choice]
        assert [span.name for span in own] == ["queue", "prefill", "decode"]
        assert all(span.parent.span_id == root.context.span_id for span in own)
        edges = [edge for span in own for edge in (span.start_time, span.end_time)]
        assert edges == sorted(edges) and edges[1] == edges[2] and edges[3] == edges[4]
        assert root.start_time <= edges[0] and edges[-1] <= root.end_time + 10**8


def test_no_span_holds_a_word_of_a_conversation_or_anything_a_client_chose(client: TestClient, kept: Any) -> None:
    said = client.post(CHAT, json=ASK | {"max_tokens": 5, "user": "kim"}).json()["choices"][0]["message"]["content"]
    client.post(CHAT, json=ASK | {"model": "없는-이름"})
    client.get("/v1/models/없는-이름")
    written = " ".join(span.to_json() for span in kept.get_finished_spans())
    assert not any(word in written for word in ("비밀", "kim", "없는", "\\uc5c6", "\\ube44")) and said
    allowed = {"http.route", "maltu.request_id", "maltu.model", "maltu.outcome", "maltu.prompt_tokens"}
    allowed |= {"maltu.answer_tokens", "maltu.choice"}
    assert {name for span in kept.get_finished_spans() for name in span.attributes} == allowed


def test_what_is_refused_or_fails_says_so_and_health_is_no_request(
    client: TestClient, kept: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        client.get(path)
    client.post(CHAT, json=ASK | {"model": "nobody"})
    monkeypatch.setattr(RowsEngine, "served", lambda engine, who: 1 / 0)
    client.post(CHAT, json=ASK)
    found = [(span.attributes["maltu.outcome"], span.status.is_ok) for span in spans(kept)[CHAT]]
    assert found == [("refused", True), ("failed", False)] and len(kept.get_finished_spans()) == 2


def test_an_answer_that_never_began_has_a_queue_alone(tracing: Tracing, kept: Any) -> None:
    class Said:
        times = Times(asked=1, over=9)

    class Untimed:
        times = None

    said: Any = [Said(), Untimed()]
    tracing.note("a", said, (3, 0))
    tracing.request("a", (CHAT, "casual", "gone"), 0.5)
    queue, root = kept.get_finished_spans()
    assert (queue.name, queue.start_time, queue.end_time) == ("queue", 1, 9) and root.attributes[
        "maltu.prompt_tokens"
    ] == 3


def test_what_is_noted_is_bounded(tracing: Tracing) -> None:
    for number in range(N_NOTED + 10):
        tracing.note(str(number), [], (0, 0))
    assert len(tracing._noted) == N_NOTED


class Collector(BaseHTTPRequestHandler):
    """Keeps the bodies it is sent."""

    bodies: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[HTTPServer]:
    handler = type("Own", (Collector,), {"bodies": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_spans_arrive_at_a_collector(collector: HTTPServer, engine: Any) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    settings = read_settings(["casual"], {NAMES[0]: f"http://127.0.0.1:{collector.server_port}"})
    tracing = open_tracing(str(settings.traces))
    with TestClient(create_app(engine, Bounds(100), tracing=tracing)) as client:
        assert client.post(CHAT, json=ASK).status_code == 200
    tracing.close()
    ((path, body),) = collector.RequestHandlerClass.bodies  # type: ignore[attr-defined]
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    names = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert path == "/v1/traces" and names["service.name"] == "maltu"
    assert [span.name for span in resource.scope_spans[0].spans] == [CHAT]


def test_a_collector_that_is_away_costs_nobody_anything(engine: Any) -> None:
    tracing = open_tracing("http://127.0.0.1:9/v1/traces")
    with TestClient(create_app(engine, Bounds(100), tracing=tracing)) as client:
        since = time.monotonic()
        assert {client.post(CHAT, json=ASK).status_code for _ in range(20)} == {200}
        assert time.monotonic() - since < 10  # one export alone would take longer with its retries
    tracing.close()


@pytest.mark.parametrize(
    ("argv", "environment", "traces"),
    [
        ([], {}, None),
        (["--otel-endpoint", "http://a:4318/"], {NAMES[0]: "http://b:4318"}, "http://a:4318/v1/traces"),
        ([], {"MALTU_OTEL_ENDPOINT": "http://a:4318"}, "http://a:4318/v1/traces"),
        ([], {NAMES[0]: "http://b:4318"}, "http://b:4318/v1/traces"),
        ([], {NAMES[0]: "http://b:4318", NAMES[1]: "https://c/x"}, "https://c/x"),
        ([], {NAMES[0]: "http://b:4318", "OTEL_SDK_DISABLED": "true"}, None),
        ([], {NAMES[0]: "http://b:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
        ([], {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, None),
    ],
)
def test_where_they_go_is_said_by_flag_or_by_the_standards_variables(
    argv: list[str], environment: dict[str, str], traces: str | None
) -> None:
    assert read_settings(["casual", *argv], environment).traces == traces


def test_an_address_that_is_none_and_another_protocol_are_refused() -> None:
    with pytest.raises(InputError) as raised:
        read_settings(["casual", "--otel-endpoint", "b:4318"], {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert [one.where for one in raised.value.problems] == ["--otel-endpoint", "OTEL_EXPORTER_OTLP_PROTOCOL"]


def test_without_the_packages_it_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InputError, match=r"maltu\[otel\]"):
        open_tracing("http://127.0.0.1:4318/v1/traces")


@pytest.mark.slow
def test_a_server_that_is_told_where_sends_its_last_spans_when_it_stops(
    collector: HTTPServer, start: Any, runs: Path, tmp_path: Path
) -> None:
    address = f"http://127.0.0.1:{collector.server_port}"
    server = start("casual", "--runs", str(runs), "--no-ui", "--otel-endpoint", address, log=tmp_path / "log.txt")
    assert f"traces    {address}/v1/traces" in server.said
    assert httpx.post(f"{server.address}{CHAT}", json=ASK | {"max_tokens": 4}, timeout=60).status_code == 200
    assert stop_server(server) == 0
    bodies = collector.RequestHandlerClass.bodies  # type: ignore[attr-defined]
    assert any(b"prefill" in body for _, body in bodies)


@pytest.mark.slow  # loads all of the server
def test_nothing_of_it_is_loaded_when_it_is_off() -> None:
    found = "[name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]"
    code = f"import sys, serve.api, serve.tracing, serve.engines.rows; print({found})"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
