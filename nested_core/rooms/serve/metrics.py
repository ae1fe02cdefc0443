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
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nested_core.rooms.serve.engine import VersionedGenerator
from nested_core.rooms.serve.served_version import ServedVersion

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RATE_WINDOW_SECONDS = 60
# Upper bounds of the histogram, in seconds: from an answer of one token to a long one.
SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class TokenRate:
    """Tokens a second over the last minute, or since the beginning where that is later."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._by_second: deque[list[int]] = deque(maxlen=RATE_WINDOW_SECONDS)  # [second, tokens]
        self._lock = threading.Lock()
        self.tokens = 0  # since the beginning

    def add_token(self) -> None:
        """Count one token now."""
        second = int(time.monotonic())
        with self._lock:
            self.tokens += 1
            if not self._by_second or self._by_second[-1][0] != second:
                self._by_second.append([second, 0])
            self._by_second[-1][1] += 1

    def per_second(self) -> float:
        """The mean rate, in tokens a second."""
        now = time.monotonic()
        with self._lock:
            counts = [n for second, n in self._by_second if second > int(now) - RATE_WINDOW_SECONDS]
        return sum(counts) / min(max(now - self._began, 1.0), RATE_WINDOW_SECONDS)


@dataclass
class NameStatus:
    """What is served for one name, as `/health` gives it.

    since: when the version began to be served, UTC.
    requests: how many were begun for the name, for whichever version.
    last_swap_seconds: from finding the champion changed to serving it; None before any swap.
    swaps: how often another version began to be served.
    refused: a champion that is not served, with the reason; None if the champion is served.
    """

    current: ServedVersion
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    requests: int = 0
    last_swap_seconds: float | None = None
    swaps: int = 0
    refused: dict[str, str] | None = None
    rate: TokenRate = field(default_factory=TokenRate)

    def fields(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "version": self.current.version,
            "since": self.since.isoformat(timespec="seconds"),
            "requests": self.requests,
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
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "nested_tune_requests",
            "Requests that were answered or refused, by HTTP status.",
            ("name", "code"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "nested_tune_request_seconds",
            "Seconds from a request to the end of its answer; without what was refused.",
            ("name",),
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(self)

    def note_request(self, name: str | None, code: int, seconds: float) -> None:
        """Count a request that has ended; `name` is None for one that was for no name here."""
        self._requests.labels(name or "", code).inc()
        if name is not None:
            self._seconds.labels(name).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """What the server knows of itself now."""
        for metric, said, value in (
            ("healthy", "1 where answers are generated.", self._generator.is_healthy),
            ("problems", "Problems that /health names.", len(self._problems)),
        ):
            yield GaugeMetricFamily(f"nested_tune_{metric}", said, float(value))
        version = GaugeMetricFamily(
            "nested_tune_adapter_info", "1: the version that is served.", labels=("name", "version")
        )
        tokens = CounterMetricFamily("nested_tune_tokens", "Tokens generated.", labels=("name",))
        swaps = CounterMetricFamily("nested_tune_swaps", "Changes of version.", labels=("name",))
        seconds = GaugeMetricFamily(
            "nested_tune_last_swap_seconds",
            "Seconds from finding the last new champion to serving it.",
            labels=("name",),
        )
        refused = GaugeMetricFamily(
            "nested_tune_champion_refused", "1 where the champion is not served.", labels=("name",)
        )
        for name, status in self._names.items():
            version.add_metric((name, status.current.version), 1.0)
            tokens.add_metric((name,), status.rate.tokens)
            swaps.add_metric((name,), status.swaps)
            refused.add_metric((name,), float(status.refused is not None))
            if status.last_swap_seconds is not None:
                seconds.add_metric((name,), status.last_swap_seconds)
        yield from (version, tokens, swaps, seconds, refused)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
