"""What is served for each name, with its counts; /health and GET /metrics are made of it.

Requests and their seconds are counted as they end. All else is read from the server when it is
asked for, so that a scrape costs what /health costs.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nested_core.rooms.serve.engine import VersionedGenerator
from nested_core.rooms.serve.served_version import ServedVersion

CLIENT_CLOSED_REQUEST = 499  # as nginx counts it
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RATE_WINDOW_SECONDS = 60
LABELS = ("name", "version")
# Upper bounds of the histogram, in seconds: from an answer of one token to a long one.
SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class TokenRate:
    """Tokens a second over the last minute, or since the beginning where that is later."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._counts = deque([(self._began, 0)], maxlen=RATE_WINDOW_SECONDS)  # time, tokens before
        self._lock = threading.Lock()
        self.tokens = 0  # since the beginning

    def add_token(self) -> None:
        """Count one token now."""
        now = time.monotonic()
        with self._lock:
            if now - self._counts[-1][0] >= 1.0:
                self._counts.append((now, self.tokens))
            self.tokens += 1

    def per_second(self) -> float:
        """Return the mean rate, in tokens a second."""
        now = time.monotonic()
        with self._lock:
            before = [n for began, n in self._counts if now - began < RATE_WINDOW_SECONDS]
            tokens = self.tokens - before[0] if before else 0
        return tokens / min(max(now - self._began, 1.0), RATE_WINDOW_SECONDS)


@dataclass
class NameStatus:
    """What is served for one name, as `/health` gives it.

    since: when the version began to be served, UTC.
    requests: how many were begun for the name, for whichever version.
    without_system_text: how many of them lacked the system text of the version's training rows.
    has_plain_text: whether one lacked the chat template of these rows.
    last_swap_seconds: from finding the champion changed to serving it; None before any swap.
    swaps: how often another version began to be served.
    refused: a champion that is not served, with the reason; None if the champion is served.
    retry_at: when it is tried again, by time.monotonic().
    """

    current: ServedVersion
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    requests: int = 0
    without_system_text: int = 0
    has_plain_text: bool = False
    last_swap_seconds: float | None = None
    swaps: int = 0
    refused: dict[str, str] | None = None
    retry_at: float = 0.0
    rate: TokenRate = field(default_factory=TokenRate)

    def fields(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return {
            "version": self.current.version,
            "since": self.since.isoformat(timespec="seconds"),
            "requests": self.requests,
            "requests_without_system_text": self.without_system_text,
            "tokens_per_second": round(self.rate.per_second(), 3),
            "last_swap_seconds": self.last_swap_seconds,
            "refused": self.refused,
        }


class ServingMetrics(Collector):
    """The metrics of one server."""

    def __init__(
        self, generator: VersionedGenerator, names: Mapping[str, NameStatus], problems: Sized
    ) -> None:
        """`problems` are those that /health names."""
        self._generator = generator
        self._names = names
        self._problems = problems
        registry = self._registry = CollectorRegistry()
        said = "Requests that were answered or refused, by HTTP status; 499: its client left."
        self._requests = Counter("nested_tune_requests", said, ("name", "code"), registry=registry)
        said = "Seconds from a request to the end of its answer; without what was refused or left."
        about = ("nested_tune_request_seconds", said, ("name",))
        self._seconds = Histogram(*about, buckets=SECONDS_BUCKETS, registry=registry)
        registry.register(self)

    def note_request(self, name: str | None, code: int, seconds: float) -> None:
        """Count a request that has ended; `name` is None for one that was for no name here."""
        self._requests.labels(name or "", code).inc()
        if name is not None and code == HTTPStatus.OK:
            self._seconds.labels(name).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yield what the server knows of itself now."""
        healthy = {(): float(self._generator.is_healthy)}
        yield _family("healthy", "1 where answers are generated.", healthy)
        yield _family("problems", "Problems that /health names.", {(): len(self._problems)})
        names = {(name,): status for name, status in self._names.items()}
        versions = {(*key, status.current.version): 1.0 for key, status in names.items()}
        yield _family("adapter_info", "1: the version that is served.", versions)
        tokens = {key: status.rate.tokens for key, status in names.items()}
        yield _family("tokens", "Tokens generated.", tokens, CounterMetricFamily)
        swaps = {key: status.swaps for key, status in names.items()}
        yield _family("swaps", "Changes of version.", swaps, CounterMetricFamily)
        seconds = {key: s.last_swap_seconds for key, s in names.items() if s.swaps}
        said = "Seconds from finding the last new champion to serving it."
        yield _family("last_swap_seconds", said, seconds)
        lacking = {key: status.without_system_text for key, status in names.items()}
        said = "Requests that lack the system text of training."
        yield _family("requests_without_system_text", said, lacking, CounterMetricFamily)
        refused = {key: float(status.refused is not None) for key, status in names.items()}
        yield _family("champion_refused", "1 where the champion is not served.", refused)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


def _family(
    metric: str, said: str, values: Mapping[Any, float | None], kind: Any = GaugeMetricFamily
) -> Any:
    """Make a metric with its values by name, and by version where the key has one too."""
    labels = LABELS[: len(next(iter(values), ("",)))]
    family: Any = kind(f"nested_tune_{metric}", said, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
