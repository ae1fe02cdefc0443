"""serve's HTTP: OpenAI's routes as mlx_lm has them, what is refused, and the API key."""

from __future__ import annotations

import http.client
import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from nested_core.rooms.serve import http_handler
from nested_core.rooms.serve.http_handler import MAX_BODY_BYTES
from nested_core.text.json_log import JsonFormatter
from tests.example import generate_answers
from tests.left_out import slow_except
from tests.rooms.serve.versions import CHAT, NAME, NO_END, QUESTION, Client, serving, settings
from tests.waiting import wait_until


@pytest.fixture
def version(version_and_registry: tuple[str, Path]) -> str:
    return version_and_registry[0]


def stream(client: Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a streamed answer; the last line has to say that it is whole."""
    reply = client.send("POST", path, body | {"stream": True, "model": NAME})
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream"
    lines = [line[6:] for line in reply.body.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_streamed_answer_is_the_whole_one_and_each_piece_names_the_version(
    client: Client, version: str, runs: dict[int, Path], base: Path
) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    body = {"messages": messages, "stream_options": {"include_usage": True}}
    *pieces, usage = stream(client, "/v1/chat/completions", body)
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    (expected,) = generate_answers(
        str(base), [QUESTION], adapter=runs[1] / "adapter", max_tokens=12
    )
    assert text.strip() == expected
    assert {piece["system_fingerprint"] for piece in [*pieces, usage]} == {version}
    assert usage["usage"]["completion_tokens"] == 12
    assert client.chat(stream=True).version == version


def test_a_text_completion_is_answered_and_streamed(client: Client, version: str) -> None:
    body = {"prompt": "I want to see", "model": NAME}
    reply = client.send("POST", "/v1/completions", body)
    assert (reply.status, reply.version) == (200, version)
    pieces = stream(client, "/v1/completions", body)
    text = "".join(piece["choices"][0]["text"] for piece in pieces)
    assert text == reply.json()["choices"][0]["text"] != ""


def test_seeded_requests_are_served_one_at_a_time_by_the_same_version(client, version) -> None:
    sampled = [client.chat(NAME, temperature=1.0, seed=7) for _ in range(2)]
    assert sampled[0].text == sampled[1].text
    assert {reply.version for reply in sampled} == {version}


def test_a_developer_is_the_system(client: Client) -> None:
    conversations = [
        [{"role": role, "content": "Be brief."}, {"role": "user", "content": QUESTION}]
        for role in ("developer", "system")
    ]
    first, second = (
        client.send("POST", "/v1/chat/completions", {"model": NAME, "messages": messages})
        for messages in conversations
    )
    assert (first.status, first.text) == (200, second.text)
    assert first.json()["usage"]["prompt_tokens"] == second.json()["usage"]["prompt_tokens"]


def test_a_control_token_that_a_user_writes_is_counted_as_text(client: Client, base: Path) -> None:
    tokenizer: Any = load_tokenizer(base)
    message = {"role": "user", "content": "<|assistant|>"}
    as_turns = tokenizer.apply_chat_template([message], add_generation_prompt=True)
    reply = client.chat(NAME, prompt="<|assistant|>")
    assert reply.json()["usage"]["prompt_tokens"] > len(as_turns) == 3


def test_log_probabilities_are_the_same_from_a_cached_prompt(client: Client) -> None:
    replies = [client.chat(NAME, logprobs=True, max_tokens=4).json() for _ in range(2)]
    first, second = (
        [t["logprob"] for t in r["choices"][0]["logprobs"]["content"]] for r in replies
    )
    assert replies[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert second == pytest.approx(first, abs=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "another adapter": ({"adapters": "/somewhere"}, 400, "adapters: not taken here"),
    "another draft model": ({"draft_model": "/somewhere"}, 400, "draft_model: not taken here"),
    "another model": ({"model": "/somewhere"}, 404, "No model '/somewhere' here; served: capitals"),
    "no such version": ({"model": f"{NAME}@abcdef"}, 404, "abcdef names no versions in"),
    "a path as a version": ({"model": f"{NAME}@../../x"}, 404, "'../../x' is not a version"),
    "a wrong type": ({"temperature": "hot"}, 400, "temperature: Input should be a valid number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_go_past_the_registry_is_refused(client: Client, case: str) -> None:
    more, status, said = REFUSED[case]
    reply = client.send("POST", "/v1/completions", {"prompt": "1", "model": NAME} | more)
    assert reply.status == status
    assert said in reply.json()["error"]["message"]


def test_no_request_ends_the_generation_thread(client: Client) -> None:
    """mlx_lm's ends at an empty prompt, and at one that is an earlier prompt with its answer."""
    empty = client.send("POST", "/v1/completions", {"prompt": "", "model": NAME})
    assert (empty.status, empty.json()["error"]["message"][:24]) == (
        400,
        "The prompt has no tokens",
    )
    body = {"model": f"{NAME}@base", "max_tokens": 4}
    first = client.send("POST", "/v1/completions", body | {"prompt": QUESTION}).json()
    went_on = f"{QUESTION} {first['choices'][0]['text']}"
    again = client.send("POST", "/v1/completions", body | {"prompt": went_on})
    assert again.status == 200
    assert client.health()["status"] == "ok"


ENDING: dict[str, tuple[dict[str, Any], str]] = {
    "a stop that is no text": ({"stop": [1]}, "stop.0: Input should be a valid string"),
    "stops that are no list": ({"stop": 5}, "stop: Input should be a valid list"),
    "more tokens than there are": ({"top_k": 10**6, "temperature": 1.0}, "top_k must be below"),
    "a threshold out of bounds": (
        {"xtc_probability": 0.5, "xtc_threshold": 0.9, "temperature": 1.0},
        "xtc_threshold: Input should be less than or equal to 0.5",
    ),
    "a token that there is none of": ({"logit_bias": {"999999": 5}}, "must name tokens from 0 to"),
    "a negative token": (
        {"logit_bias": {"-3": 5}},
        "logit_bias.-3.[key]: String should match pattern",
    ),
    "a seed far below 0": (
        {"seed": -(2**70)},
        "seed: Input should be greater than or equal to -92",
    ),
    "a seed out of bounds": (
        {"seed": 2**70},
        "seed: Input should be less than 18446744073709551616",
    ),
    "more tokens than may be": (
        {"max_completion_tokens": 2**20 + 1},
        "max_completion_tokens: Input should be less than or equal to 1048576",
    ),
    "too many stops": ({"stop": ["a"] * 17}, "stop: Value should have at most 16 items"),
    "a stop that is too long": ({"stop": "a" * 257}, "at most 256 characters"),
    "a prompt longer than the model sees": (
        {"messages": [{"role": "user", "content": "Where to? " * 4096}]},
        "tokens, and the model sees 4096",
    ),
    "stream options without a dictionary": (
        {"stream_options": [1]},
        "stream_options: Input should be",
    ),
    "usage that is no flag": (
        {"stream_options": {"include_usage": 1}},
        "include_usage: Input should be a valid boolean",
    ),
}


@pytest.mark.parametrize("case", ENDING)
def test_what_ends_mlx_lms_thread_or_process_is_a_wrong_request(client, case, version) -> None:
    body, said = ENDING[case]
    reply = client.chat(NAME, max_tokens=3, **body)
    assert reply.status == 400
    assert said in reply.json()["error"]["message"]
    assert client.chat(NAME, max_tokens=3, temperature=1.0).version == version


def begin_and_leave(client: Client, is_streamed: bool) -> socket.socket:
    """A connection that asked for an answer without end, once it is generated."""
    messages = [{"role": "user", "content": QUESTION}]
    body = json.dumps({"messages": messages, "stream": is_streamed, **NO_END}).encode()
    under_way = client.server.generator.under_way
    wait_until(lambda: not under_way, "a request that was just answered has been forgotten")
    connection = client.connect()
    head = f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    wait_until(lambda: len(under_way) > 0, "it is under way")
    return connection


def test_where_too_many_requests_are_under_way_the_next_one_is_sent_away(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_handler, "MAX_WAITING_REQUESTS", 1)
    assert client.chat(NAME).status == 200
    with begin_and_leave(client, is_streamed=False):
        reply = client.chat(NAME)
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["type"] == "server_error"
    wait_until(lambda: not client.server.generator.under_way, "nothing is under way")


@pytest.mark.parametrize(
    "is_streamed", slow_except([False, True], True, reason="another long answer")
)
def test_an_answer_ends_when_its_client_is_gone(client: Client, is_streamed: bool) -> None:
    with begin_and_leave(client, is_streamed):
        pass
    wait_until(lambda: not client.server.generator.under_way, "the answer has ended")
    left = f'nested_tune_requests_total{{code="499",name="{NAME}"}}'.encode()
    wait_until(lambda: left in client.server.metrics.render(), "it is counted as left")


def test_an_answer_ends_though_its_client_sent_more_before_it_left(client: Client) -> None:
    under_way = client.server.generator.under_way
    with begin_and_leave(client, is_streamed=False) as connection:
        (request,) = under_way.values()
        connection.sendall(b"\r\n")
    wait_until(lambda: not under_way, "the answer has ended")
    assert 0 < request.given_tokens < 4_000, "the context has room for 4,096"


IMAGE = "http://127.0.0.1:1/latest/meta-data/iam"
NOT_DONE: dict[str, tuple[dict[str, Any], str]] = {
    "an address that the server would fetch": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": IMAGE}]}]},
        "this server fetches no address",
    ),
    "a template of the client's": (
        {"chat_template_kwargs": {"chat_template": "{% for i in range(9) %}{% endfor %}"}},
        "chat_template_kwargs: chat_template not taken here",
    ),
    "arguments of the tokenizer": (
        {"chat_template_kwargs": {"padding": "max_length", "max_length": 4_000_000}},
        "chat_template_kwargs: max_length, padding not taken here",
    ),
    "an argument of the tokenizer that its template reads": (
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        "chat_template_kwargs: add_generation_prompt not taken here",
    ),
    "an unknown template argument": (
        {"chat_template_kwargs": {"depth": 5}},
        "chat_template_kwargs: depth not taken here",
    ),
    "several answers": ({"n": 3}, "n: Input should be less than or equal to 1"),
    "log probabilities by number": ({"logprobs": 5}, "logprobs: Input should be a valid boolean"),
    "an answer in JSON": (
        {"response_format": {"type": "json_object"}},
        "response_format.type: Input should be 'text'",
    ),
    "a tool that is to be called": ({"tool_choice": "required"}, "tool_choice: Input should be"),
    "tools that are not to be called": (
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        "tool_choice: Input should be 'auto'",
    ),
    "an unknown key": ({"beams": 4}, "beams: not taken here"),
    "a number that is none": ({"temperature": float("nan")}, "NaN is not a JSON number"),
    "half a character": ({"stop": "\ud800"}, "surrogates not allowed"),
    "messages that are a text": ({"messages": "hi"}, "messages: Input should be a valid list"),
    "several problems": ({"top_p": 2, "n": 2}, "n: Input should be less than or equal to 1"),
}


@pytest.mark.parametrize("case", NOT_DONE)
def test_what_is_not_done_here_is_refused_with_its_reason(client: Client, case: str) -> None:
    body, said = NOT_DONE[case]
    reply = client.chat(NAME, max_tokens=3, **body)
    assert reply.status == 400
    error = reply.json()["error"]
    assert said in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", None)


def test_what_cannot_change_an_answer_is_taken_and_null_is_the_default(client: Client) -> None:
    nulls: dict[str, Any] = dict.fromkeys(
        ("temperature", "max_tokens", "top_p", "stream", "logprobs", "n", "stop")
    )
    more: dict[str, Any] = {"user": "me", "metadata": {"a": "b"}, "store": False, "n": 1}
    more |= {"tool_choice": "auto", "parallel_tool_calls": True, "tools": [], "seed": -1}
    assert client.chat(NAME, **nulls).text == client.chat(NAME, **more).text == client.chat().text
    listed = client.send("POST", "/v1/completions", {"prompt": [QUESTION]}).json()
    alone = client.send("POST", "/v1/completions", {"prompt": QUESTION}).json()
    assert listed["choices"] == alone["choices"]


def test_a_text_that_no_context_has_room_for_is_refused_before_it_is_encoded(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = client.server.generator.model_provider
    tokenizer = provider.tokenizer
    encoded: list[int] = []

    def note_and_encode(text: str, **options: Any) -> Any:
        encoded.append(len(text))
        return type(tokenizer._tokenizer).encode(tokenizer._tokenizer, text, **options)

    monkeypatch.setattr(tokenizer._tokenizer, "encode", note_and_encode, raising=False)
    assert client.send("POST", "/v1/completions", {"prompt": QUESTION}).status == 200
    reply = client.send("POST", "/v1/completions", {"prompt": "I want to see. " * 200_000})
    error = reply.json()["error"]
    assert (reply.status, error["code"]) == (400, "context_length_exceeded")
    assert "The prompt has 3000000 bytes, and the model sees 4096 tokens" in error["message"]
    assert max(encoded) == len(QUESTION)


def test_a_template_that_fails_at_what_a_client_sent_is_the_clients_fault(client: Client) -> None:
    roles = [{"role": "tool", "content": None}, {"role": "assistant"}, {"role": "assistant"}]
    deep: Any = {}
    for _ in range(300):
        deep = {"a": deep}
    function = {"name": "f", "parameters": deep}
    for more in ({"messages": roles}, {"tools": [{"type": "function", "function": function}]}):
        reply = client.chat(NAME, max_tokens=1, **more)
        assert reply.status in (200, 400)


def test_what_is_raised_while_a_request_is_generated_ends_it_and_not_the_server(
    client: Client, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    def raise_error(_: Any) -> Any:
        raise ValueError("planted")

    generator = client.server.generator
    with monkeypatch.context() as patch:
        patch.setattr(generator, "_log_cache_stats", lambda: raise_error(None))
        reply = client.chat(NAME, max_tokens=3)
    assert (reply.status, reply.json()["error"]["message"]) == (503, "ValueError: planted")
    again = client.chat(NAME, max_tokens=3, temperature=1.0)
    assert (again.status, again.version) == (200, version)
    assert client.health()["status"] == "ok"


def test_named_origins_keep_other_pages_out(version_and_registry: tuple[str, Path]) -> None:
    flags = ("--name", NAME, "--allowed-origins", "https://mine.example")
    body = {"prompt": "1", "model": NAME, "max_tokens": 1}
    asked: dict[str, tuple[dict[str, str], int]] = {
        "no page": ({}, 200),
        "a page that is named": ({"Origin": "https://mine.example"}, 200),
        "another page": ({"Origin": "https://evil.example"}, 403),
        "the machine's other name": ({"Host": "localhost:80"}, 200),
        "a name that was made to lead here": ({"Host": "evil.example:80"}, 421),
        "no host": ({"Host": "["}, 421),
    }
    with serving(settings(version_and_registry[1], *flags)) as named:
        for case, (headers, status) in asked.items():
            assert named.send("POST", "/v1/completions", body, headers).status == status, case
            assert named.send("GET", "/v1/models", None, headers).status == status, case
        assert named.send("OPTIONS", "/v1/models", None, asked["another page"][0]).status == 403


def test_every_wrong_request_has_an_answer_in_the_shape_of_errors(client: Client) -> None:
    post = b"POST /v1/completions HTTP/1.1\r\n"
    wrong: dict[bytes, int] = {
        post + b"Content-Length: " + b"1" * 5000 + b"\r\n\r\n": 413,
        post + b"Content-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1): 413,
        post + b"Content-Length: -1\r\n\r\n": 400,
        post + b"Content-Length: many\r\n\r\n": 400,
        post + b"Content-Length: 1\r\n\r\n{": 400,
        post + b"Content-Length: 3\r\n\r\n[1]": 400,
        post + b"Content-Length: 10\r\n\r\n" + '{"a"'.encode("utf-16"): 400,
        post + b"Content-Length: 19\r\n\r\n" + b'{"logit_bias":null}': 400,
        post + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n": 411,
        b"POST /nothing HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}": 404,
        b"GET /nothing HTTP/1.1\r\n\r\n": 404,
        b"PUT / HTTP/1.1\r\n\r\n": 405,
    }
    for sent, status in wrong.items():
        with client.connect() as connection:
            connection.sendall(sent)
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.status == status
            assert set(json.loads(response.read())["error"]) == {"message", "type", "code"}
    assert client.send("OPTIONS", "/v1/models").status == 204


def test_a_body_that_ends_before_its_length_is_refused_though_it_is_json(client: Client) -> None:
    before = client.server.follower.names[NAME].requests
    head = f"POST {CHAT} HTTP/1.1\r\nContent-Length: 5000\r\n\r\n"
    body = json.dumps({"messages": [{"role": "user", "content": "Where?"}], "max_tokens": 1})
    with client.connect() as connection:
        connection.sendall(f"{head}{body}".encode())
        connection.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 400
        assert "before its Content-Length" in json.loads(response.read())["error"]["message"]
    assert client.server.follower.names[NAME].requests == before


def test_control_characters_of_a_client_are_escaped_in_the_log(client, caplog) -> None:
    with caplog.at_level(logging.INFO), client.connect() as connection:
        connection.sendall(b"GET /\x1b]0;owned\x07\x9b31m HTTP/1.0\r\n\r\n")
        while connection.recv(4096):
            pass
    (line,) = [text for text in caplog.messages if "owned" in text]
    assert r"GET /\x1b]0;owned\x07\x9b31m HTTP/1.0" in line


def test_a_request_is_one_line_of_the_log_with_what_answered_it_and_its_seconds(
    client: Client, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.setFormatter(JsonFormatter())
    with caplog.at_level(logging.INFO):
        assert client.chat(stream=True).status == 200
        assert client.send("POST", "/v1/else", {}).status == 404
        wait_until(lambda: "/v1/else" in caplog.text, "both have ended")
    ours = [record for record in caplog.records if record.module == "http_handler"]
    answered, refused = [json.loads(caplog.handler.format(record)) for record in ours]
    assert answered["request"] == "POST /v1/chat/completions HTTP/1.1"
    assert (answered["status"], answered["adapter"]) == (200, NAME)
    assert (answered["version"], answered["seconds"] > 0) == (version, True)
    assert f"{NAME}@{version[:12]}" in answered["message"]
    assert (refused["status"], refused["adapter"], refused["version"]) == (404, None, None)


def test_stream_options_without_usage_are_answered(client: Client, version: str) -> None:
    pieces = stream(client, "/v1/completions", {"prompt": QUESTION, "stream_options": {}})
    assert {piece["system_fingerprint"] for piece in pieces} == {version}


def test_health_gives_what_is_served(client: Client, version: str) -> None:
    before = client.health()["names"][NAME]
    client.chat(NAME)
    health = client.health()
    status = health["names"][NAME]
    assert (health["status"], status["version"]) == ("ok", version)
    assert status["requests"] == before["requests"] + 1
    assert status["tokens_per_second"] > 0
    assert status["last_swap_seconds"] is None
    assert status["since"].endswith("+00:00")


def test_a_key_is_asked_for_where_one_is_set(version_and_registry: tuple[str, Path]) -> None:
    with serving(settings(version_and_registry[1], "--name", NAME, api_key="söcret")) as client:
        key = {"Authorization": "Bearer söcret".encode().decode("latin-1")}
        body = {"prompt": "1", "model": NAME}
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "söcret"}):
            assert client.send("POST", "/v1/completions", body, headers).status == 401
            assert client.send("GET", "/v1/models", None, headers).status == 401
        assert client.send("POST", "/v1/completions", body, key).status == 200
        assert client.send("GET", "/v1/models", None, key).status == 200
        lower = {"Authorization": key["Authorization"].replace("Bearer", "bearer")}
        assert client.send("GET", "/v1/models", None, lower).status == 200
        assert client.health()["status"] == "ok"
