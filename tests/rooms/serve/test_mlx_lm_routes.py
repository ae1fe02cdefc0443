"""mlx_lm.server's own tests of its routes (tests/test_server.py of mlx-lm), run against ours.

They ask the example's model, by its name in a registry, in place of Qwen1.5-0.5B-Chat-4bit. Left
out, because they test classes of mlx_lm without a server: TestTextStateMachine, TestKeepalive,
TestLRUPromptCache, TestMakeSampler, and of TestServer test_make_state_machine_empty_tool_call_end.
test_handle_completions compares two answers without the penalty of repetitions: from a
cached prompt, mlx_lm's penalty sees the tokens alone that the cache lacks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nested_core.data.tokens.tokenizer_source import TokenizerSource
from tests.example import MODEL
from tests.rooms.serve.versions import NAME, Client, serving, settings

pytestmark = pytest.mark.slow("sends the requests of mlx_lm's own tests")

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
HELLO: list[dict[str, Any]] = [SYSTEM, {"role": "user", "content": "Hello!"}]
SAMPLED = {"max_tokens": 10, "temperature": 0.7, "top_p": 0.85, "repetition_penalty": 1.2}
GREEDY = {"max_tokens": 10, "temperature": 0.0}
# The example's own template takes no turns of tools.
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content or '' }} {% endfor %}assistant:"
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "handle_chat_completions": HELLO,
    "handle_chat_completions_with_content_fragments": [
        {"role": role["role"], "content": [{"type": "text", "text": role["content"]}]}
        for role in HELLO
    ],
    "handle_chat_completions_with_null_tool_content": [
        {"role": "user", "content": "what is 2+3?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "id": "123",
                    "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'},
                }
            ],
        },
        {"role": "tool", "content": "5", "tool_call_id": "123"},
    ],
}


@pytest.fixture(scope="module")
def drafting(version_and_registry: tuple[str, Path], base: Path) -> Iterator[Client]:
    """A server whose draft model is the base itself."""
    with serving(
        settings(version_and_registry[1], "--name", NAME, "--draft-model", base)
    ) as running:
        yield running


def complete(client: Client, **body: Any) -> Any:
    reply = client.send("POST", "/v1/completions", body)
    assert reply.status == 200, reply
    return reply.json()


def chat(client: Client, messages: list[dict[str, Any]], **body: Any) -> Any:
    request = {"model": NAME, "messages": messages} | body
    reply = client.send("POST", "/v1/chat/completions", request)
    assert reply.status == 200, reply
    return reply.json()


def test_handle_completions(client: Client) -> None:
    body = {
        "model": "default_model",
        "prompt": "Once upon a time",
        "max_tokens": 10,
        "temperature": 0.5,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "repetition_context_size": 20,
        "seed": 999,
        "stop": "stop sequence",
    }
    assert complete(client, **body)["choices"]
    del body["repetition_penalty"]
    first, second = complete(client, **body), complete(client, **body)
    assert first["id"]
    assert first["choices"][0]["text"] == second["choices"][0]["text"]


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_handle_chat_completions(version_and_registry: tuple[str, Path], case: str) -> None:
    flags = ("--name", NAME, "--chat-template", TEMPLATE)
    with serving(settings(version_and_registry[1], *flags)) as client:
        body = chat(client, CONVERSATIONS[case], **SAMPLED)
    assert body["id"]
    assert body["choices"]


def test_the_operators_template_is_what_a_chat_is_rendered_by(
    version_and_registry: tuple[str, Path],
) -> None:
    template = "OPERATOR {{ messages[0].content }}{# <tool_call> tool_call.name #}"
    flags = ("--name", NAME, "--chat-template", template)
    with serving(settings(version_and_registry[1], *flags)) as client:
        # As mlx_lm reads it from the template
        assert client.server.generator.model_provider.tokenizer.has_tool_calling
        body = chat(client, [{"role": "user", "content": "Where is Oslo?"}], **GREEDY)
    tokens = (
        TokenizerSource(str(MODEL))
        .load()
        .encode("OPERATOR Where is Oslo?", add_special_tokens=False)
    )
    assert body["usage"]["prompt_tokens"] == len(tokens)


def test_handle_models(client: Client) -> None:
    reply = client.send("GET", "/v1/models")
    assert reply.status == 200
    document = reply.json()
    assert document["object"] == "list"
    assert document["data"]
    model = document["data"][0]
    assert model["id"]
    assert model["object"] == "model"
    assert "created" in model


def test_handle_completions_with_draft_model(drafting: Client) -> None:
    body = complete(drafting, model=NAME, prompt="Once upon a time", top_p=1.0, **GREEDY)
    assert body["id"]
    assert body["choices"]
    assert body["usage"]["completion_tokens"] > 0


def test_handle_chat_completions_with_draft_model(drafting: Client) -> None:
    body = chat(drafting, HELLO, **GREEDY)
    assert body["id"]
    assert body["choices"]
    assert body["usage"]["completion_tokens"] > 0


def test_streaming_with_draft_model(drafting: Client) -> None:
    body = {"model": NAME, "messages": HELLO, "stream": True} | GREEDY
    reply = drafting.send("POST", "/v1/chat/completions", body)
    assert reply.status == 200
    pieces = [
        json.loads(line[6:])
        for line in reply.body.splitlines()
        if line.startswith("data: ") and line != "data: [DONE]"
    ]
    assert pieces
    for piece in pieces:
        (choice,) = piece["choices"]
        assert "delta" in choice


def test_prompt_cache_with_draft_model(drafting: Client) -> None:
    for question in ("Tell me a story about", "Tell me a story about dragons."):
        body = chat(drafting, [SYSTEM, {"role": "user", "content": question}], **GREEDY)
        assert body["choices"][0]["message"]["content"] is not None
