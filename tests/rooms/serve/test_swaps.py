"""serve: what a swap does to requests under way, and what the server does without its registry."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nested_core.rooms.serve import engine, follower, server
from nested_core.rooms.serve.engine import VersionProvider
from tests.registry_care import audit
from tests.rooms.serve.test_following import wait_for
from tests.rooms.serve.versions import NAME, NO_END, Client, Reply, serving, settings
from tests.waiting import wait_until

pytestmark = pytest.mark.slow("serves a registry whose champion changes")

Promote = Callable[..., str]
LONG = NO_END | {"max_tokens": 400}


def ask_in_thread(client: Client, replies: list[Reply], **more: Any) -> threading.Thread:
    """Ask for a long answer, and return once a version answers it."""
    under_way = client.server.generator.under_way
    before = dict(under_way)  # one of them may have its answer, and be gone in a moment
    thread = threading.Thread(target=lambda: replies.append(client.chat(NAME, **more)))
    thread.start()
    wait_until(lambda: any(key not in before for key in list(under_way)), "it is begun")
    return thread


def test_a_request_under_way_ends_with_the_version_it_began_with(promote, registry) -> None:
    first = promote(1)
    replies: list[Reply] = []
    with serving(settings(registry, "--name", NAME)) as client:
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


def test_health_says_that_generation_stands_still_and_the_server_ends_all_the_same(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(1)
    monkeypatch.setattr(engine, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(engine, "SECONDS_TO_END", 0.5)
    monkeypatch.setattr(server, "SECONDS_TO_FINISH", 0.0)
    goes_on = threading.Event()
    load = VersionProvider.load

    def wait_and_load(*given: Any) -> Any:
        goes_on.wait(60)
        return load(*given)

    with serving(settings(registry, "--name", NAME)) as client:
        assert client.health()["status"] == "ok"
        monkeypatch.setattr(VersionProvider, "load", wait_and_load)
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
def test_a_server_that_is_asked_to_end_finishes_what_is_under_way(promote, registry) -> None:
    promote(1)
    replies: list[Reply] = []
    with serving(settings(registry, "--name", NAME)) as client:
        thread = ask_in_thread(client, replies, **LONG)
    thread.join()
    (reply,) = replies
    assert (reply.status, reply.json()["usage"]["completion_tokens"]) == (200, 400)


def test_a_registry_that_is_gone_for_a_while_stops_nothing(promote, registry) -> None:
    first = promote(1)
    away = registry.with_name("away")
    with serving(settings(registry, "--name", NAME)) as client:
        registry.rename(away)
        problems = client.server.follower.problems
        wait_until(lambda: NAME in problems, "the follower has seen it")
        assert problems[NAME] in client.health()["problems"]
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
            patch.setattr(follower, "read_champion", lambda *_: 1 / 0)
            wait_until(
                lambda: client.health()["problems"] == ["ZeroDivisionError: division by zero"]
            )
            assert client.chat(NAME).version == first
        wait_for(client, promote(2))
        wait_until(lambda: client.health()["problems"] == [], "no problem is left")
