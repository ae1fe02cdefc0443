"""serve, asked by OpenAI's client library, whole and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.rooms.serve.test_following import expected
from tests.rooms.serve.versions import NAME, QUESTION, serving, settings

if TYPE_CHECKING:
    import openai  # half a second, which only the worker that runs these tests takes

pytestmark = pytest.mark.slow("imports the client, and asks a server by it")

KEY = "only-in-tests"
MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [
    {"role": "user", "content": QUESTION}
]


@pytest.fixture(scope="module")
def served(version_and_registry: tuple[str, Path]) -> Iterator[tuple[str, str]]:
    """The version that is champion, and the address of its server."""
    version, registry = version_and_registry
    with serving(settings(registry, "--name", NAME, api_key=KEY)) as running:
        yield version, running.server.address


@pytest.fixture
def client(served: tuple[str, str]) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{served[1]}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_the_library_gets_the_answer_of_the_version_that_is_named(
    client: openai.OpenAI, served: tuple[str, str], runs: dict[int, Path], base: Path
) -> None:
    raw = client.chat.completions.with_raw_response.create(model=NAME, messages=MESSAGES)
    answer = raw.parse()
    assert raw.headers["X-Adapter-Version"] == answer.system_fingerprint == served[0]
    assert str(answer.choices[0].message.content).strip() == expected(base, runs[1])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert f"{NAME}@{served[0]}" in [model.id for model in client.models.list()]


def test_the_library_reads_a_streamed_answer(client, served, runs, base) -> None:
    pieces = list(
        client.chat.completions.create(
            model=NAME, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text.strip() == expected(base, runs[1])
    assert {piece.system_fingerprint for piece in pieces} == {served[0]}
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 12
    whole = client.completions.create(model=NAME, prompt=QUESTION)
    streamed = client.completions.create(model=NAME, prompt=QUESTION, stream=True)
    assert "".join(piece.choices[0].text for piece in streamed) == whole.choices[0].text


def test_the_library_raises_its_own_errors_with_what_the_server_said(client: openai.OpenAI) -> None:
    import openai

    stranger = client.with_options(api_key="other")
    wrong: list[tuple[openai.OpenAI, dict[str, Any], type[openai.APIStatusError], str]] = [
        (client, {"model": "other"}, openai.NotFoundError, "No model 'other' here"),
        (client, {"adapters": "/x"}, openai.BadRequestError, "adapters: not taken here"),
        (
            client,
            {"messages": "hi"},
            openai.BadRequestError,
            "messages: Input should be a valid list",
        ),
        (stranger, {}, openai.AuthenticationError, "Give the server's API key"),
    ]
    kinds: dict[type[openai.APIStatusError], str] = {
        openai.NotFoundError: "not_found_error",
        openai.BadRequestError: "invalid_request_error",
        openai.AuthenticationError: "authentication_error",
    }
    for asking, body, kind, said in wrong:
        with pytest.raises(kind) as raised:
            asking.chat.completions.create(model=NAME, messages=MESSAGES, extra_body=body)
        assert said in raised.value.message
        assert raised.value.type == kinds[kind]
