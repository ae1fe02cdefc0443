"""serve's /metrics: what Prometheus reads of requests, tokens, seconds, swaps and versions."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.rooms.serve.versions import NAME, Client, serving, settings
from tests.waiting import wait_until


def read_metrics(client: Client) -> dict[tuple[str, ...], float]:
    """Each sample by name and labels' values, in the labels' order, without the buckets."""
    reply = client.send("GET", "/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (
            sample.name.removeprefix("nested_tune_"),
            *(v for _, v in sorted(sample.labels.items())),
        ): (sample.value)
        for family in text_string_to_metric_families(reply.body)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


@pytest.mark.slow("a server that swaps versions")
def test_requests_tokens_seconds_swaps_and_the_version_are_counted(promote, registry) -> None:
    first = promote(1)
    with serving(settings(registry, "--name", NAME)) as client:
        assert read_metrics(client) == {
            ("healthy",): 1.0,
            ("problems",): 0.0,
            ("adapter_info", NAME, first): 1.0,
            ("tokens_total", NAME): 0.0,
            ("swaps_total", NAME): 0.0,
            ("champion_refused", NAME): 0.0,
        }
        usage = client.chat().json()["usage"]["completion_tokens"]
        client.chat(stream=True)
        assert client.send("POST", "/v1/chat/completions", {"model": "none"}).status == 400
        assert client.send("POST", "/v1/else", {}).status == 404
        second = promote(2)
        wait_until(lambda: client.chat().version == second, "the swap is over")
        wait_until(lambda: read_metrics(client)["swaps_total", NAME] == 1.0, "it is counted")
        now = read_metrics(client)
    asked = now["requests_total", "200", NAME]
    assert asked >= 3
    assert now["requests_total", "400", ""] == 1.0
    assert now["requests_total", "404", ""] == 1.0
    assert now["request_seconds_count", NAME] == asked
    assert now["request_seconds_sum", NAME] > 0
    assert (
        now["tokens_total", NAME] >= 2 * usage
    )  # of the first two; the other version may stop early
    assert now["adapter_info", NAME, second] == 1.0
    assert ("adapter_info", NAME, first) not in now
    assert now["last_swap_seconds", NAME] > 0


def test_whoever_scrapes_needs_no_key_and_no_other_origin_reads_it(promote, registry) -> None:
    promote(1)
    with serving(
        settings(registry, "--name", NAME, "--allowed-origins", "http://b", api_key="secret")
    ) as client:
        assert client.send("GET", "/metrics").status == 200
        assert client.send("GET", "/metrics", headers={"Origin": "http://a"}).status == 403
