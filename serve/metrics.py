"""What a running server tells Prometheus. Labels are of bounded sets: routes, served names, owners of keys never.

docs/monitoring/ has a dashboard and alerts over these names.
"""

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from serve.engines.contract import Engine

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STATES = ("ready", "failing", "draining", "stopped")


class Metrics:
    """Counts one server's requests. Each has a registry of its own."""

    def __init__(self, engine: Engine, n_slots: int | None = None) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter(
            "maltu_requests", "Requests by route, model and outcome", ("route", "model", "outcome"), **own
        )
        self._took = Histogram(
            "maltu_request_seconds", "From the request's first byte to its end", ("route",), buckets=_SECONDS, **own
        )
        self._first = Histogram(
            "maltu_first_token_seconds", "Until the first text of an answer", ("model",), buckets=_SECONDS, **own
        )
        self._between = Histogram(
            "maltu_between_tokens_seconds", "Between pieces of an answer", ("model",), buckets=_SECONDS, **own
        )
        self._tokens = Counter("maltu_tokens", "Tokens read and written", ("model", "kind"), **own)
        self._changes = Counter("maltu_changes", "Runs loaded, unloaded, reloaded", ("action", "outcome"), **own)
        self._feedback = Counter("maltu_feedback", "Feedback taken in", ("kind",), **own)
        for collector in (_Engine(engine, n_slots), ProcessCollector(registry=None), PlatformCollector(registry=None)):
            self._registry.register(collector)

    def count(self, route: str, model: str, outcome: str, took_s: float) -> None:
        """A request is over."""
        self._requests.labels(route, model, outcome).inc()
        self._took.labels(route).observe(took_s)

    def watch(self, model: str) -> "Watch":
        """Begin to time an answer."""
        return Watch(model, self._first.labels(model), self._between.labels(model))

    def tokens(self, model: str, n_prompt: int, n_said: int) -> None:
        """An answer is over."""
        self._tokens.labels(model, "prompt").inc(n_prompt)
        self._tokens.labels(model, "answer").inc(n_said)

    def change(self, action: str, outcome: str) -> None:
        """A run was loaded, unloaded or reloaded, or was not."""
        self._changes.labels(action, outcome).inc()

    def feedback(self, kind: str) -> None:
        """Feedback was stored."""
        self._feedback.labels(kind).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class Watch:
    """Times the pieces of one answer, choice by choice."""

    def __init__(self, model: str, first: Histogram, between: Histogram) -> None:
        self.model, self._first, self._between = model, first, between
        self._since = time.monotonic()
        self._last: dict[int, float] = {}

    def piece(self, place: int, piece: str) -> None:
        """A piece of a choice is here."""
        now = time.monotonic()
        if place in self._last:
            self._between.observe(now - self._last[place])
        else:
            self._first.observe(now - self._since)
        self._last[place] = now


class _Engine(Collector):
    """Reads the engine whenever it is asked."""

    def __init__(self, engine: Engine, n_slots: int | None) -> None:
        self._engine, self._n_slots = engine, n_slots

    def collect(self) -> Iterator[Any]:
        load = self._engine.load()
        yield GaugeMetricFamily("maltu_running", "Answers that are written", load.n_running)
        yield GaugeMetricFamily("maltu_waiting", "Requests that wait for a slot", load.n_waiting)
        yield GaugeMetricFamily("maltu_models", "Names that answer", len(self._engine.models()))
        if self._n_slots is not None:
            yield GaugeMetricFamily("maltu_slots", "Answers that can be written side by side", self._n_slots)
        state = GaugeMetricFamily("maltu_state", "1 for the engine's state", labels=("state",))
        for name in _STATES:
            state.add_metric((name,), float(load.state == name))
        yield state
        yield CounterMetricFamily("maltu_failures", "Answers that failed inside the engine", load.n_failures)
        yield CounterMetricFamily("maltu_prompt_tokens", "Prompt tokens of admitted requests", load.n_prompt)
        yield CounterMetricFamily("maltu_reused_tokens", "Of these, found in the cache", load.n_reused)
        yield CounterMetricFamily("maltu_cache_hits", "Requests that found a prefix in the cache", load.n_hits)
