"""serve's HTTP: OpenAI's routes as mlx_lm has them, what is refused, and the API key."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nested_core.serve import http_handler
from nested_core.serve.http_handler import MAX_BODY_BYTES
from tests.core.serve.versions import (
    NAME,
    QUESTION,
    Client,
    promote_run,
    serving,
    settings,
)
from tests.example import generate_answers


@pytest.fixture(scope="module")
def version_and_registry(
    runs: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    registry = tmp_path_factory.mktemp("served") / "registry"
    return promote_run(runs[1], registry), registry


@pytest.fixture(scope="module")
def client(version_and_registry: tuple[str, Path]) -> Iterator[Client]:
    with serving(settings(version_and_registry[1], "--name", NAME)) as running:
        yield running


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


def test_seeded_and_stopped_requests_are_served_one_at_a_time_by_the_same_version(
    client: Client, version: str
) -> None:
    sampled = [client.chat(NAME, temperature=1.0, seed=7) for _ in range(2)]
    assert sampled[0].text == sampled[1].text
    assert {reply.version for reply in sampled} == {version}
    whole = client.chat(NAME).text
    stop = f" {whole.split()[1]}"
    assert client.chat(NAME, stop=[stop]).text == whole.partition(stop)[0]


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
    "a negative token": ({"logit_bias": {"-3": 5}}, "expected the number of a token"),
    "a negative seed": ({"seed": -5}, "seed: Input should be greater than or equal to 0"),
    "a seed out of bounds": ({"seed": 2**70}, "seed: Input should be less than or equal to"),
    "more tokens than may be": (
        {"max_completion_tokens": 2**20 + 1},
        "max_completion_tokens: Input should be less than or equal to 1048576",
    ),
    "too many stops": ({"stop": ["a"] * 17}, "stop: Value should have at most 16 items"),
    "a stop that is too long": ({"stop": "a" * 257}, "at most 256 characters"),
    "a prompt longer than the model sees": (
        {"messages": [{"role": "user", "content": "Where to? " * 64}]},
        "tokens, and the model sees 64",
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
def test_what_ends_mlx_lms_thread_or_process_is_a_wrong_request(
    client: Client, case: str, version: str
) -> None:
    body, said = ENDING[case]
    reply = client.chat(NAME, max_tokens=3, **body)
    assert reply.status == 400
    assert said in reply.json()["error"]["message"]
    assert client.chat(NAME, max_tokens=3, temperature=1.0).version == version


def test_bodies_that_are_no_request_are_told_apart(client: Client) -> None:
    host, port = client.server.address.removeprefix("http://").split(":")
    for body, said in ((b"{", "Invalid JSON"), (b"[1]", "should be a JSON dictionary")):
        connection = http.client.HTTPConnection(host, int(port), timeout=300)
        connection.request("POST", "/v1/completions", body)
        response = connection.getresponse()
        assert (response.status, said in response.read().decode()) == (400, True)
        connection.close()
    assert client.send("POST", "/v1/embeddings", {}).status == 404
    assert client.send("GET", "/nothing").status == 404
    assert client.send("OPTIONS", "/v1/models").status == 204


def test_a_body_that_is_too_large_or_of_no_length_is_refused_unread(client: Client) -> None:
    host, port = client.server.address.removeprefix("http://").split(":")
    for length, status in ((str(MAX_BODY_BYTES + 1), 413), ("-1", 400), ("many", 400)):
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        assert connection.getresponse().status == status
        connection.close()


def test_where_too_many_requests_wait_the_next_one_is_sent_away(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_handler, "MAX_WAITING_REQUESTS", 0)
    reply = client.chat(NAME)
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")


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
        assert client.health()["status"] == "ok"
