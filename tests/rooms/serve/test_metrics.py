"""serve's /metrics: what Prometheus reads of requests, tokens, seconds, swaps and versions."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.rooms.serve.versions import NAME, QUESTION, Client, serving, settings
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
            ("requests_without_system_text_total", NAME): 0.0,
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


def test_a_text_without_the_chat_template_of_training_is_logged_once(
    client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = client.server.follower.names[NAME]

    def told(path: str = "/v1/completions", **body: Any) -> int:
        """How many lines of the log say it after this request."""
        assert client.send("POST", path, body | {"model": NAME, "max_tokens": 1}).status == 200
        return caplog.text.count("without the chat template of training")

    monkeypatch.setattr(status, "has_plain_text", False)
    monkeypatch.setattr(status.current, "is_chat", True)
    with caplog.at_level(logging.WARNING):
        assert told("/v1/chat/completions", messages=[{"role": "user", "content": QUESTION}]) == 0
        assert told(prompt=f"<|user|>{QUESTION}<|assistant|>") == 0
        monkeypatch.setattr(status.current, "is_chat", False)
        assert told(prompt=QUESTION) == 0  # as the rows were
        monkeypatch.setattr(status.current, "is_chat", True)
        assert told(prompt=QUESTION) == 1
        assert told(prompt=QUESTION) == 1


def test_requests_without_the_system_text_of_training_are_counted_and_logged_once(
    client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = client.server.follower.names[NAME].current
    asked = {"role": "user", "content": QUESTION}
    text = "Say a city."

    def lacking(path: str = "/v1/chat/completions", **body: Any) -> int:
        """How many more requests lack the text after this one, by /health and by /metrics."""
        before = client.server.follower.names[NAME].without_system_text
        assert client.send("POST", path, body | {"model": NAME, "max_tokens": 1}).status == 200
        told = client.send("GET", "/health").json()["names"][NAME]["requests_without_system_text"]
        family = f'nested_tune_requests_without_system_text_total{{name="{NAME}"}} {told}.0'
        assert family in client.send("GET", "/metrics").body
        return int(told - before)

    assert lacking(messages=[asked]) == 0  # whose rows have none
    monkeypatch.setattr(version, "system", text)
    with caplog.at_level(logging.WARNING):
        for content, count in ((text, 0), ([{"type": "text", "text": text}], 0), ("Hello.", 1)):
            for role in ("system", "developer"):
                assert lacking(messages=[{"role": role, "content": content}, asked]) == count
        assert lacking(messages=[asked]) == 1
        assert lacking(messages=[asked, {"role": "system", "content": text}, asked]) == 1
        assert lacking("/v1/completions", prompt=QUESTION) == 1
        assert lacking("/v1/completions", prompt=f"<|system|>{text}<|user|>{QUESTION}") == 0
    assert [one.message for one in caplog.records if "system text" in one.message] == [
        f"{NAME}: a request lacks the system text of training"
    ]
