"""Traces of requests for OpenTelemetry: when each came, waited, was read and written. Off unless somebody names where
they go; nothing of OpenTelemetry is loaded then.

    trace  POST /v1/chat/completions  maltu.request_id, maltu.model, maltu.outcome, tokens
             queue      until it has a place in the batch
             prefill    until its first token
             decode     until its last

A span is made when its request is over, and sent by a thread of its own; a collector that is away costs no answer
anything (what does not fit into the exporter's queue is dropped). No span holds a word of a conversation, and the
values of every attribute but the request's id are of the bounded sets that the metrics have.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from structlog.contextvars import get_contextvars

from serve.engines.contract import Reply, Times
from serve.settings import COMMAND
from toolkit.errors import InputError, Problem

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

Count = Callable[[str, str, str, float], None]
EXPORT_S = 5  # how long one try may take
LAST_S = 1.0  # what is left to send when the server stops may take so long
N_NOTED = 4096  # requests whose answers are over, and that are not
_UNTRACED = ("/healthz", "/readyz", "/metrics")


class Tracing:
    """Makes spans of requests. Used on one event loop."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider, self._tracer = provider, provider.get_tracer("maltu")
        self._noted: OrderedDict[str, tuple[list[Times], tuple[int, int]]] = OrderedDict()

    def note(self, request_id: str, replies: Sequence[Reply], n_tokens: tuple[int, int]) -> None:
        """The answer to a request is over. n_tokens: read and written."""
        self._noted[request_id] = [reply.times for reply in replies if reply.times is not None], n_tokens
        while len(self._noted) > N_NOTED:
            self._noted.popitem(last=False)

    def counting(self, count: Count) -> Count:
        """`count`, and beside it a trace of every request that is counted, under the id that the log has bound."""

        def counted(route: str, model: str, outcome: str, took_s: float) -> None:
            count(route, model, outcome, took_s)
            if route not in _UNTRACED:
                self.request(str(get_contextvars().get("request_id", "")), (route, model, outcome), took_s)

        return counted

    def request(self, request_id: str, what: tuple[str, str, str], took_s: float) -> None:
        """A request is over. what: its route, model and outcome."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        route, model, outcome = what
        answers, n_tokens = self._noted.pop(request_id, ([], (0, 0)))
        end = time.time_ns()
        attributes: dict[str, str | int] = {"http.route": route, "maltu.request_id": request_id}
        attributes |= {"maltu.model": model, "maltu.outcome": outcome}
        attributes |= {"maltu.prompt_tokens": n_tokens[0], "maltu.answer_tokens": n_tokens[1]}
        span = self._tracer.start_span(
            route, Context(), SpanKind.SERVER, attributes, start_time=end - round(took_s * 1e9)
        )
        if outcome == "failed":
            span.set_status(Status(StatusCode.ERROR))
        around = set_span_in_context(span, Context())
        for choice, times in enumerate(answers):
            self._answer(around, choice, times, end)
        span.end(end)

    def close(self) -> None:
        """Send what is left, as far as that is quick."""
        closing = threading.Thread(target=self._provider.shutdown, name="last traces", daemon=True)
        closing.start()
        closing.join(LAST_S)

    def _answer(self, around: "Context", choice: int, times: Times, end: int) -> None:
        """The spans of one choice. What it never came to has none; the last it came to ends with it."""
        stages = (("queue", times.asked), ("prefill", times.begun), ("decode", times.first))
        begun = [(name, since) for name, since in stages if since is not None]
        ends = [since for _, since in begun[1:]] + [times.over or end]
        for (name, since), until in zip(begun, ends, strict=True):
            self._tracer.start_span(name, around, attributes={"maltu.choice": choice}, start_time=since).end(until)


def open_tracing(url: str) -> Tracing:
    """Traces that go to a collector, OTLP over HTTP. Raises InputError where OpenTelemetry is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        says = f"traces are to go to {url}, and {error.name} is not installed. pip install 'maltu[otel]'"
        raise InputError(COMMAND, [Problem("--otel-endpoint", says)]) from None
    resource = Resource.create({SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME") or "maltu"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=EXPORT_S)))
    return Tracing(provider)
