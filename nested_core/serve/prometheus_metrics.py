"""What a server did, for Prometheus: the content of GET /metrics, by Prometheus' own client.

Requests and their seconds are counted as they end. All else is read from the server when it is
asked for, so that a scrape costs what /health costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nested_core.serve.response_generator import RegistryResponseGenerator

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds of the histogram, in seconds: from an answer of one token to a long one.
SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class ServingMetrics(Collector):
    """The metrics of one server."""

    def __init__(
        self, generator: RegistryResponseGenerator, count_problems: Callable[[], int]
    ) -> None:
        """`count_problems` tells how many problems /health names now."""
        self._generator = generator
        self._count_problems = count_problems
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
        yield GaugeMetricFamily(
            "nested_tune_healthy",
            "1 where answers are generated.",
            float(self._generator.is_healthy),
        )
        yield GaugeMetricFamily(
            "nested_tune_problems", "Problems that /health names.", float(self._count_problems())
        )
        labels = ("name",)
        version = GaugeMetricFamily(
            "nested_tune_adapter_info", "1: the version that is served.", labels=("name", "version")
        )
        tokens = CounterMetricFamily("nested_tune_tokens", "Tokens generated.", labels=labels)
        swaps = CounterMetricFamily("nested_tune_swaps", "Changes of the version.", labels=labels)
        seconds = GaugeMetricFamily(
            "nested_tune_last_swap_seconds",
            "Seconds from finding the last new champion to its first token.",
            labels=labels,
        )
        refused = GaugeMetricFamily(
            "nested_tune_champion_refused", "1 where the champion is not served.", labels=labels
        )
        for name, status in self._generator.names.items():
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
