"""serve: what a swap does to requests under way, and what the server does without its registry."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nested_core.registry import audit
from nested_core.registry.serving_status import ServingRecord, read_serving_records
from nested_core.serve import champion_follower, response_generator
from nested_core.serve.response_generator import RegistryModelProvider
from tests.core.serve.test_following import wait_for
from tests.core.serve.versions import NAME, Client, Reply, serving, settings
from tests.waiting import wait_until

Promote = Callable[..., str]
NO_END: dict[str, Any] = {
    "max_tokens": 10**6,
    "logit_bias": {"0": -1000},
}  # without the end of text
LONG = NO_END | {"max_tokens": 400}


def ask_in_thread(client: Client, replies: list[Reply], **more: Any) -> threading.Thread:
    """Ask for a long answer, and return once a version answers it."""
    under_way = client.server.generator.under_way
    before = dict(under_way)  # one of them may have its answer, and be gone in a moment
    thread = threading.Thread(target=lambda: replies.append(client.chat(NAME, **more)))
    thread.start()
    wait_until(lambda: any(key not in before for key in list(under_way)), "it is begun")
    return thread


def test_a_request_under_way_ends_with_the_version_it_began_with(
    promote: Promote, registry: Path
) -> None:
    first = promote(1)
    replies: list[Reply] = []
    with serving(settings(registry, "--name", NAME, "--swap-wait", 600)) as client:
        alone = client.chat(NAME, **LONG)
        thread = ask_in_thread(client, replies, **LONG)
        second = promote(2)
        wait_until(
            lambda: client.health()["names"][NAME]["version"] == second, "the swap has begun"
        )
        assert client.chat(NAME).version == second  # it waited for the long one
        thread.join()
    (long,) = replies
    assert (long.status, long.version) == (200, first)
    assert long.json()["usage"]["completion_tokens"] == 400
    assert long.text == alone.text


@pytest.mark.slow("a server of its own, and answers of hundreds of tokens")
def test_a_swap_waits_no_longer_than_it_may_and_says_so_to_whom_it_ends(
    promote: Promote, registry: Path
) -> None:
    first = promote(1)
    replies: list[Reply] = []
    with serving(settings(registry, "--name", NAME, "--swap-wait", 0.5)) as client:
        threads = [
            ask_in_thread(client, replies, **NO_END),
            ask_in_thread(client, replies, **NO_END, stream=True),
        ]
        second = promote(2)
        wait_for(client, second)
        for thread in threads:
            thread.join()
        assert client.chat(NAME).version == second
    whole, streamed = sorted(replies, key=lambda reply: -reply.status)
    assert (whole.status, whole.headers["retry-after"], whole.version) == (503, "1", first)
    assert "longer than a change to version" in whole.json()["error"]["message"]
    last = [line for line in streamed.body.splitlines() if line.startswith("data: ")][-1]
    assert "longer than a change to version" in json.loads(last[6:])["error"]["message"]
    assert streamed.version == first


@pytest.mark.slow("a server of its own, and answers of hundreds of tokens")
def test_requests_that_come_to_run_late_hold_no_swap_up_and_the_server_says_that_it_lives(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(champion_follower, "HEARTBEAT_SECONDS", 0.0)
    first = promote(1)
    replies: list[Reply] = []
    with serving(settings(registry, "--name", NAME, "--swap-wait", 3)) as client:
        (file,) = (registry / NAME / "serving").iterdir()
        threads = [ask_in_thread(client, replies, **NO_END)]
        for version in ("base", first):  # each waits behind the one before
            late = threading.Thread(
                target=lambda v=version: replies.append(client.chat(f"{NAME}@{v}", **NO_END))
            )
            late.start()
            threads.append(late)
        generator = client.server.generator
        wait_until(lambda: generator.count_waiting() == 3, "they wait")
        second = promote(2)
        heard = file.read_text()
        wait_until(lambda: file.read_text() != heard, "it says that it lives")
        assert generator.names[NAME].last_swap_seconds is None  # it waits for 3 seconds at least
        wait_until(lambda: generator.names[NAME].current.version == second, "the swap has begun")
        for thread in threads:
            thread.join(60)
        assert client.chat(NAME).version == second
    assert [reply.status for reply in replies] == [503] * 3


def test_health_says_that_generation_stands_still_and_the_server_ends_all_the_same(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(1)
    monkeypatch.setattr(response_generator, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(response_generator, "SECONDS_TO_END", 0.5)
    goes_on = threading.Event()
    load = RegistryModelProvider.load

    def wait_and_load(*given: Any) -> Any:
        goes_on.wait(60)
        return load(*given)

    with serving(settings(registry, "--name", NAME, "--swap-wait", 0)) as client:
        assert client.health()["status"] == "ok"
        monkeypatch.setattr(RegistryModelProvider, "load", wait_and_load)
        thread = threading.Thread(target=lambda: client.chat(NAME))
        thread.start()
        wait_until(lambda: client.send("GET", "/health").status == 503, "it says so")
        assert client.health()["status"] == "unavailable"
        generator = client.server.generator
    assert not generator.has_ended
    goes_on.set()
    wait_until(lambda: generator.has_ended, "it ends")
    thread.join(60)


@pytest.mark.slow("a server of its own, and answers of hundreds of tokens")
def test_a_server_that_is_asked_to_end_finishes_what_is_under_way(
    promote: Promote, registry: Path
) -> None:
    promote(1)
    replies: list[Reply] = []
    with serving(settings(registry, "--name", NAME)) as client:
        thread = ask_in_thread(client, replies, **LONG)
    thread.join()
    (reply,) = replies
    assert (reply.status, reply.json()["usage"]["completion_tokens"]) == (200, 400)


def test_a_registry_that_is_gone_for_a_while_stops_nothing(
    promote: Promote, registry: Path
) -> None:
    first = promote(1)
    away = registry.with_name("away")
    with serving(settings(registry, "--name", NAME)) as client:
        registry.rename(away)
        follower = client.server.follower
        wait_until(lambda: NAME in follower.problems, "the follower has seen it")
        assert follower.problems[NAME] in client.health()["problems"]
        assert client.chat(NAME).version == first
        assert client.send("GET", "/v1/models").status == 200
        assert client.chat(f"{NAME}@{'0' * 64}").status == 404
        assert not registry.exists()
        away.rename(registry)
        wait_for(client, promote(2))
        wait_until(lambda: client.health()["problems"] == [], "no problem is left")
    assert audit(registry, NAME).is_sound


def test_an_error_that_nobody_foresaw_is_said_and_does_not_end_the_following(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = promote(1)
    with serving(settings(registry, "--name", NAME)) as client:
        with monkeypatch.context() as patch:
            patch.setattr(champion_follower, "read_champion", lambda *_: 1 / 0)
            wait_until(
                lambda: client.health()["problems"] == ["ZeroDivisionError: division by zero"]
            )
            assert client.chat(NAME).version == first
        wait_for(client, promote(2))
        wait_until(lambda: client.health()["problems"] == [], "no problem is left")


def test_a_server_that_cannot_write_to_the_registry_follows_it(
    promote: Promote, registry: Path
) -> None:
    promote(1)
    (registry / NAME / "serving").write_text("in the way")
    with serving(settings(registry, "--name", NAME)) as client:
        assert any("is not written" in text for text in client.server.follower.problems.values())
        wait_for(client, promote(2))


def test_records_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "serving"
    folder.mkdir()
    good: dict[str, Any] = {
        "address": "http://127.0.0.1:1",
        "version": "ab" * 32,
        "since": "2026-01-01T00:00:00+00:00",
        "heartbeat": "2026-01-01T00:00:00+00:00",
    }
    broken = {
        "torn-1.json": json.dumps(good)[:-5],
        "other-2.json": json.dumps(good | {"more": 1}),
        "time-3.json": json.dumps(good | {"heartbeat": "yesterday"}),
        "list-4.json": "[]",
        "number-6.json": json.dumps(good | {"version": 5}),
        "reasons-7.json": json.dumps(good | {"refused": ["no"]}),
        "name.json": json.dumps(good),
    }
    for name, text in (broken | {"host-5.json": json.dumps(good)}).items():
        (folder / name).write_text(text)
    assert read_serving_records(tmp_path) == {"host-5.json": ServingRecord(**good)}
    assert not ServingRecord(**good).is_alive(datetime.now(UTC))
