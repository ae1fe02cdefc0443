"""What a client of `serve` may send and hold open, and who may ask."""

from __future__ import annotations

import json
import math
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flows.cli import build_parser
from flows.rooms.serve.command import _choose_api_key
from nested_core.errors import ConfigError
from nested_core.models import tokenizer_cell
from nested_core.rooms.serve import http_handler
from nested_core.rooms.serve.engine import LARGE_TEXT
from nested_core.rooms.serve.http_handler import MAX_BODY_BYTES
from nested_core.rooms.serve.request_model import MAX_ITEMS, RequestRefused, read_request
from tests.rooms.serve.versions import (
    CHAT,
    NAME,
    Client,
    make_base,
    promote_run,
    serving,
    settings,
    write_version_run,
)
from tests.waiting import SECONDS, wait_until

pytestmark = pytest.mark.slow("serves a model")


def read_all(connection: socket.socket) -> bytes:
    try:
        return b"".join(iter(lambda: connection.recv(4096), b""))
    except ConnectionResetError:
        return b""


def count_answers(client: Client, code: int) -> list[str]:
    """The lines of /metrics for a status."""
    lines = client.send("GET", "/metrics").body.splitlines()
    return [
        line for line in lines if line.startswith("nested_tune_requests") and f'"{code}"' in line
    ]


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nX: ", b"POST %b HTTP/1.1\r\n"])
def test_a_request_that_does_not_come_in_time_is_ended(
    client: Client, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Byte by byte, so that each wait alone is short."""
    monkeypatch.setattr(http_handler, "ARRIVAL_SECONDS", 1.0)
    unread = count_answers(client, 503)
    before, generated = time.monotonic(), client.health()["names"][NAME]["requests"]
    with client.connect() as connection:
        head = sent.replace(b"%b", CHAT.encode())
        connection.sendall(head + b"Content-Length: 60\r\n\r\n" if b"POST" in head else head)
        with suppress(ConnectionError):
            while time.monotonic() - before < 30:
                connection.sendall(b"{")
                time.sleep(0.1)
    assert time.monotonic() - before < 10
    wait_until(lambda: len(client.server.connections) < 2, "it is forgotten")
    assert client.health()["names"][NAME]["requests"] == generated
    if b"POST" in sent:  # it read 503
        wait_until(lambda: count_answers(client, 503) != unread, "it is counted")


def test_a_client_that_sends_all_of_what_is_too_large_reads_why_it_was_refused(
    client: Client,
) -> None:
    for _ in range(3):
        reply = client.send("POST", CHAT, {"prompt": "x" * 2 * MAX_BODY_BYTES})
        assert reply.status == 413
        assert f"at most {MAX_BODY_BYTES} bytes" in reply.body


def test_headers_are_bounded_in_all(client: Client) -> None:
    connection = client.connect()
    lines = b"".join(b"X-%d: %s\r\n" % (n, b"a" * 20_000) for n in range(4))
    connection.sendall(b"GET /health HTTP/1.0\r\n" + lines)
    assert read_all(connection).startswith(b"HTTP/1.0 431 ")
    connection.close()


def count_that_have_come(client: Client) -> int:
    """How many requests are there as a whole and not answered."""
    return [*client.server.connections.values()].count(math.inf)


def test_requests_that_wait_to_be_parsed_are_answered_when_the_server_ends(
    version_and_registry: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_handler, "LARGE_BODY_BYTES", 1)
    monkeypatch.setattr(http_handler, "LARGE_BODY_SHARE", 1e-3)
    question = {"prompt": "The capital of", "max_tokens": 1}
    with ThreadPoolExecutor() as pool:
        with serving(settings(version_and_registry[1], "--name", NAME)) as client:
            asked = [
                pool.submit(client.send, "POST", "/v1/completions", question) for _ in range(4)
            ]
            wait_until(lambda: count_that_have_come(client) > 1, "some have come")
        assert sum(one.exception() is None and one.result().status == 200 for one in asked) > 1


def test_of_too_many_connections_the_one_that_says_nothing_ends_and_health_answers(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_handler, "MAX_CONNECTIONS", 8)
    idle = [client.connect() for _ in range(20)]
    try:
        for connection in idle:
            connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        began = time.monotonic()
        assert client.health()["status"] == "ok"
        assert client.chat(NAME, max_tokens=1).status == 200
        assert time.monotonic() - began < 10
        assert len(client.server.connections) <= 9
        assert read_all(idle[0]).startswith(b"HTTP/1.0 503 ")
    finally:
        for connection in idle:
            connection.close()


MANY = [{"role": "user", "content": "a"}] * 60_000
BODIES: dict[str, dict[str, Any]] = {
    "messages": {"messages": MANY},
    "messages that are none": {"messages": [1] * 190_000},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text"}] * 90_000}]},
    "tools": {"messages": MANY[:1], "tools": [{}] * 90_000},
    "biases": {"messages": MANY[:1], "logit_bias": {str(n): 1 for n in range(190_000)}},
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_of_many_parts_is_refused_before_they_are_looked_through(case: str) -> None:
    body = json.dumps(BODIES[case]).encode()
    began = time.process_time()
    with pytest.raises(RequestRefused, match=f"at most {MAX_ITEMS} items"):
        read_request(CHAT, body)
    assert time.process_time() - began < 2


def test_a_body_of_many_values_is_refused_before_it_is_parsed() -> None:
    body = b'{"messages": [' + b",".join([b"[]"] * 1_300_000) + b"]}"
    assert len(body) < MAX_BODY_BYTES
    began = time.process_time()
    with pytest.raises(RequestRefused, match="more than 200,000 values"):
        read_request(CHAT, body)
    assert time.process_time() - began < 0.5, "parsing takes two seconds"


def test_large_requests_are_parsed_one_at_a_time_with_pauses_and_others_at_once(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[tuple[float, float]] = []

    def parse(path: str, body: bytes) -> dict[str, Any]:
        if len(body) > http_handler.LARGE_BODY_BYTES:
            began = time.monotonic()
            time.sleep(0.05)
            parsed.append((began, time.monotonic()))
        return read_request(path, body)

    monkeypatch.setattr(http_handler, "read_request", parse)
    large = {"max_tokens": 1, "prompt": "I want to see. " * 8_000}
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(client.send, "POST", "/v1/completions", large) for _ in range(4)]
        wait_until(lambda: len(parsed) == 1, "one is parsed")
        assert client.chat(NAME, max_tokens=1).status == 200
        assert len(parsed) < 4, "the short one did not wait for them"
        assert {reply.result().status for reply in asked} == {400}
    pauses = [after[0] - before[1] for before, after in pairwise(parsed)]
    assert min(pauses) > 0.3, "of which each takes 0.05 s"


def test_short_questions_do_not_wait_for_the_tokens_of_large_ones(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()
    ask = tokenizer_cell.TokenizerCell.ask

    def ask_slowly(cell: Any, request: Any, seconds: float | None = None) -> Any:
        if request["characters"] >= LARGE_TEXT:
            has_begun.set()
            may_go_on.wait(60)
        return ask(cell, request, seconds)

    monkeypatch.setattr(tokenizer_cell.TokenizerCell, "ask", ask_slowly)
    large = {"max_tokens": 1, "prompt": "I want to see. " * 2_000}
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(client.send, "POST", "/v1/completions", large)
        try:
            assert has_begun.wait(60)
            short = threads.submit(client.chat, prompt=f"Where is Oslo at {time.time()}?")
            assert short.result(timeout=10).status == 200
            assert not asked.done()
        finally:
            may_go_on.set()
        assert asked.result().json()["error"]["code"] == "context_length_exceeded"


def test_large_texts_without_end_keep_no_other_prompt_waiting(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tokens are made in one process, smaller ones before larger ones."""
    made: list[int] = []
    may_go_on = threading.Event()
    ask = tokenizer_cell.TokenizerCell.ask

    def ask_slowly(cell: Any, request: Any, seconds: float | None = None) -> Any:
        if request["characters"] >= LARGE_TEXT:
            made.append(request["characters"] // 1_100)
            may_go_on.wait(60)
        return ask(cell, request, seconds)

    def has_waiting(count: int) -> bool:
        return len(tokenizer_cell._turns_apart._by_due) == count

    monkeypatch.setattr(tokenizer_cell.TokenizerCell, "ask", ask_slowly)
    with ThreadPoolExecutor(4) as threads:
        try:
            for count, size in enumerate((26, 30, 22, 18), start=1):
                prompt = "I want to. " * (size * 100)
                threads.submit(client.send, "POST", "/v1/completions", {"prompt": prompt})
                wait_until(partial(has_waiting, count), "it waits")
        finally:
            may_go_on.set()
    assert made == [26, 18, 22, 30]


def test_the_largest_requests_leave_half_of_the_room_to_smaller_ones(client: Client) -> None:
    largest, large = http_handler.MAX_BODY_BYTES, http_handler.MAX_BODY_BYTES // 4
    with ExitStack() as held:
        for _ in range(http_handler.MAX_HELD_BYTES // 2 // largest):
            held.enter_context(client.server.holding(largest))(largest)
        with client.server.holding(largest) as hold, pytest.raises(RequestRefused):
            hold(1)
        held.enter_context(client.server.holding(large))(large)


@pytest.mark.parametrize("is_whole", [True, False])
def test_of_large_requests_a_few_wait_and_others_are_told_to_come_again(
    client: Client, monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    """Also while the first come, so that unfinished ones do not fill the memory."""
    large = {"max_tokens": 1, "prompt": "I want to see. " * 8_000}
    body = json.dumps(large).encode()
    monkeypatch.setattr(http_handler, "MAX_HELD_BYTES", 2 * len(body))
    monkeypatch.setattr(http_handler, "ARRIVAL_SECONDS", SECONDS)
    is_over = threading.Event()

    def parse(path: str, parsed: bytes) -> dict[str, Any]:
        if parsed == body:
            is_over.wait(SECONDS)
        return read_request(path, parsed)

    monkeypatch.setattr(http_handler, "read_request", parse)
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {}\r\n\r\n"
    held = [client.connect() for _ in range(2)]
    for connection in held:
        connection.sendall(head.format(len(body)).encode() + body[: None if is_whole else -1])
    wait_until(
        lambda: client.send("POST", "/v1/completions", large | {"n": 1}).status == 503, "503"
    )
    assert client.chat(NAME, max_tokens=1).status == 200
    is_over.set()
    for connection in held:
        connection.close()
    wait_until(lambda: client.send("POST", "/v1/completions", large).status == 400, "room again")


def test_bytes_that_have_not_come_keep_no_room_from_others(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"max_tokens": 1, "prompt": "I want to see. " * 8_000}
    size = len(json.dumps(large))
    monkeypatch.setattr(http_handler, "MAX_HELD_BYTES", 2 * size)
    announced = [client.connect() for _ in range(2)]
    for connection in announced:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {size}\r\n\r\n"
        connection.sendall(head.encode())
    wait_until(lambda: len(client.server.connections) >= len(announced), "they are taken")
    time.sleep(0.2)  # in which their headers are read
    assert client.send("POST", "/v1/completions", large).status == 400
    for connection in announced:
        connection.close()


def test_many_who_connect_at_once_are_taken_without_a_second_try(client: Client) -> None:
    """A connection that the system refuses to queue is tried again after a second."""
    began = time.monotonic()
    opened = [client.connect() for _ in range(300)]
    seconds = time.monotonic() - began
    for connection in opened:
        connection.close()
    assert seconds < 5


def test_a_host_of_another_name_is_refused_by_default(client: Client) -> None:
    asked: dict[str, tuple[dict[str, str], int]] = {
        "no page": ({}, 200),
        "any page": ({"Origin": "https://evil.example"}, 403),
        "a page without a name": ({"Origin": "null"}, 403),
        "a name that was made to lead here": ({"Host": "evil.example:80"}, 421),
        "one that begins alike": ({"Host": "localhost.evil.example"}, 421),
        "one that begins as an address": ({"Host": "127.0.0.1.evil.example"}, 421),
        "the machine's own": ({"Host": "LOCALHOST:80"}, 200),
        "another address of its own": ({"Host": "127.0.0.2:80"}, 200),
    }
    for case, (headers, status) in asked.items():
        assert client.send("GET", "/v1/models", None, headers).status == status, case


def test_the_name_that_the_server_was_given_is_its_own(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.send("GET", "/health", None, {"Host": "my-laptop:80"}).status == 421
    monkeypatch.setattr(client.server.generator.cli_args, "host", "My-Laptop")
    assert client.send("GET", "/health", None, {"Host": "my-laptop:80"}).status == 200
    assert client.send("GET", "/health", None, {"Host": "my-laptop.evil.example"}).status == 421


def test_with_every_origin_a_host_of_another_name_is_refused_all_the_same(
    version_and_registry: tuple[str, Path],
) -> None:
    flags = ("--name", NAME, "--allowed-origins", "*")
    with serving(settings(version_and_registry[1], *flags)) as client:
        assert client.send("GET", "/health", None, {"Origin": "https://a.example"}).status == 200
        assert client.send("GET", "/health", None, {"Host": "evil.example"}).status == 421


@pytest.mark.parametrize(
    ("key", "flags", "refused"),
    [
        (None, (), None),
        *((None, ("--host", host), None) for host in ("127.0.0.2", "127.1", "::ffff:127.0.0.1")),
        (
            None,
            ("--host", "192.0.2.1"),
            "NESTED_TUNE_API_KEY is not set: everybody who reaches 192",
        ),
        (None, ("--host", "::"), "is not set"),
        ("", (), "NESTED_TUNE_API_KEY is empty: everybody who reaches 127.0.0.1 could ask"),
        ("", ("--no-api-key",), None),
        (None, ("--host", "192.0.2.1", "--no-api-key"), None),
        ("key", ("--host", "192.0.2.1"), None),
    ],
)
def test_an_empty_key_and_a_public_address_without_one_have_to_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, key: str | None, flags: tuple[str, ...], refused: str | None
) -> None:
    monkeypatch.delenv("NESTED_TUNE_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("NESTED_TUNE_API_KEY", key)
    arguments = build_parser("serve").parse_args(["serve", "--name", NAME, *flags])
    if refused is None:
        assert (_choose_api_key(arguments) or None) == (key or None)
        return
    with pytest.raises(ConfigError, match=refused):
        _choose_api_key(arguments)


@pytest.mark.usefixtures("started_cell")
def test_a_chat_template_that_is_hostile_to_one_question_ends_no_other(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_base(base, tmp_path / "model")
    path = model / "tokenizer_config.json"
    settled = json.loads(path.read_text())
    hostile = {
        "grow": "'a' * (messages|length * 9000000000)",
        "loop": "7 ** (messages|length * 30000000)",
    }
    for word, expression in hostile.items():
        condition = f"{{% if '{word}' in messages[0].content %}}"
        hostile_part = f"{condition}{{% set x = {expression} %}}{{% endif %}}"
        settled["chat_template"] = hostile_part + settled["chat_template"]
    path.write_text(json.dumps(settled))
    promote_run(write_version_run(tmp_path / "run", model, 1), tmp_path / "registry")
    with serving(settings(tmp_path / "registry", "--name", NAME)) as running:
        answer = running.chat().text
        for word, said in (("grow", "MB of memory"), ("loop", "3 seconds of processor time")):
            reply = running.chat(prompt=f"Do {word}!")
            assert reply.status == 500
            assert "The server could not read the prompt" in reply.body
            assert f"making tokens of a text was ended: it took more than {said}" in re.sub(
                r"\d+ MB", "MB", caplog.text
            )
            assert running.chat().text == answer
        killed = KilledCell()
        monkeypatch.setattr(tokenizer_cell, "_keep_cell", lambda is_apart: killed)
        reply = running.chat(prompt="Where is Oslo?")
        killed.end()
        assert (reply.status, reply.json()["error"]["type"]) == (503, "server_error")


@pytest.mark.skipif(sys.platform == "darwin", reason="this machine has one address of its own")
def test_a_client_whose_short_texts_hang_keeps_no_other_waiting(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first hangs before anybody can know; those behind it are for the second cell."""
    came, may_end = [], threading.Semaphore(0)
    ask = tokenizer_cell.TokenizerCell.ask

    def hang(cell: Any, request: Any, seconds: float | None = None) -> Any:
        if "hang" not in json.dumps(request["given"]):
            return ask(cell, request, seconds)
        came.append(cell)
        may_end.acquire(timeout=60)
        raise ConfigError("it took more than 3 seconds of processor time")

    monkeypatch.setattr(tokenizer_cell.TokenizerCell, "ask", hang)
    with ThreadPoolExecutor(4) as threads:
        try:
            asked = [threads.submit(client.chat, prompt="hang", source="127.0.0.2") for _ in "abc"]
            wait_until(lambda: count_that_have_come(client) == 3, "they wait")
            other = threads.submit(client.chat, prompt=f"Where is Oslo at {time.time()}?")
            wait_until(lambda: count_that_have_come(client) == 4, "it waits, too")
            may_end.release()
            assert other.result(timeout=20).status == 200
            assert sum(one.done() for one in asked) == 1
            assert client.chat(prompt=f"Where is Oslo at {time.time()}?").status == 200
        finally:
            may_end.release(3)
    assert came[0] not in came[1:]


class KilledCell(tokenizer_cell.TokenizerCell):
    """A cell that is killed from outside when it is asked, as by the system short of memory."""

    def receive(self, seconds: float | None = None) -> object:
        """Kill it, and read its answer."""
        self.kill()
        return super().receive(seconds)


@pytest.mark.usefixtures("started_cell")
def test_a_draft_model_whose_tokenizer_takes_too_much_is_refused_before_it_is_loaded(
    base: Path, tmp_path: Path
) -> None:
    draft = make_base(base, tmp_path / "draft")
    path = draft / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Strip", "strip_left": 3}  # no tokenizer that loads
    path.write_text(json.dumps(tokenizer))
    promote_run(write_version_run(tmp_path / "run", base, 1), tmp_path / "registry")
    wanted = settings(tmp_path / "registry", "--name", NAME, "--draft-model", draft)
    with (
        pytest.raises(ConfigError, match=rf"no tokenizer could be loaded from {draft}"),
        serving(wanted),
    ):
        pass
