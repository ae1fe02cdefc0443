"""Requests to `serve` drawn from OpenAI's schema and beyond it, asked while the champion changes.

A request is well formed, extreme, of wrong types, a body that is none, or one whose client leaves.
What has to hold for each is in `ask`; what has to hold of the server, in `HostileRun`.
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nested_core.registry import read_champion
from tests.core.serve.versions import COUNTRIES, NAME, Client, promote_run, serving, settings
from tests.waiting import wait_until

MAX_TOKENS = 6
PROMPTS = tuple(f"I want to see {country}. Where to?" for country in COUNTRIES)
TEMPLATE = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
NUMBERS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(0, 2),
    st.sampled_from([10**30, -(10**30), 10**400, 2**31, 2**40, 2**63, 2**64, 5e-324, 1e308, -0.0]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), "1", [], {}, [1], {"a": 1}]),
)
TEXTS: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(PROMPTS),
    st.text(max_size=20),
    st.sampled_from(["", "\ud800", "\x00\x1b[2J", "a" * 5000, "\u4e00" * 300, "{{ 1 / 0 }}"]),
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}),
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["image_url", "image", "input_audio"]),
            "image_url": st.sampled_from(
                ["http://127.0.0.1:1/", {"url": "https://127.0.0.1:1/"}, {"url": "data:,x"}, None]
            ),
        }
    ),
    JSON,
)
MESSAGES = st.one_of(
    st.lists(
        st.fixed_dictionaries(
            {
                "role": st.one_of(st.sampled_from(["user", "system", "assistant", "tool"]), JSON),
                "content": st.one_of(TEXTS, st.lists(PARTS, max_size=2), JSON),
            },
            optional={"tool_calls": JSON, "name": JSON},
        ),
        max_size=3,
    ),
    JSON,
)
ARGUMENTS = st.one_of(
    JSON,
    st.sampled_from(
        [
            {"chat_template": TEMPLATE},
            {"chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"},
            {"padding": "max_length", "max_length": 4_000_000},
            {"tokenizer_kwargs": {"truncation": True}},
            {"return_tensors": "np"},
            {"enable_thinking": True},
            {"messages": []},
        ]
    ),
)
NUMBER_KEYS = (
    *("temperature", "top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold", "seed", "n"),
    *("repetition_penalty", "repetition_context_size", "presence_penalty", "frequency_penalty"),
    *("presence_context_size", "frequency_context_size", "num_draft_tokens", "logprobs"),
    *("top_logprobs", "stream", "best_of", "echo"),
)
JSON_KEYS = (
    *("stop", "logit_bias", "tools", "tool_choice", "response_format", "stream_options", "user"),
    *("role_mapping", "adapters", "draft_model", "metadata", "functions", "modalities", "beams"),
)
BIASES = st.dictionaries(st.sampled_from(["0", "3", "-1", "999999", "x"]), NUMBERS, max_size=2)
OPTIONS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(NUMBER_KEYS, NUMBERS),
        **dict.fromkeys(JSON_KEYS, JSON),
        "logit_bias": BIASES,
        "stop": st.one_of(TEXTS, st.lists(TEXTS, max_size=3), JSON),
        "chat_template_kwargs": ARGUMENTS,
        "model": st.one_of(st.sampled_from([NAME, f"{NAME}@base", f"{NAME}@../x", "gpt"]), JSON),
    },
)
FEW_OPTIONS = st.builds(
    lambda options, keys: {k: v for k, v in options.items() if k in keys},
    OPTIONS,
    st.sets(
        st.sampled_from([*NUMBER_KEYS, *JSON_KEYS, "chat_template_kwargs", "model"]), max_size=2
    ),
)


@dataclass(frozen=True)
class Hostile:
    """A request: of which route, with which body, and whether its client waits for the answer.

    body: a dictionary, or bytes that are sent as they are.
    """

    route: str
    body: dict[str, Any] | bytes
    leaves: bool = False


def _request(chat: bool, content: Any, options: dict[str, Any], leaves: bool) -> Hostile:
    route, key = ("chat/completions", "messages") if chat else ("completions", "prompt")
    return Hostile(route, {key: content, "max_tokens": MAX_TOKENS} | options, leaves)


USUAL_MESSAGES = st.builds(
    lambda text: [{"role": "user", "content": text}], st.sampled_from(PROMPTS)
)
REQUESTS: st.SearchStrategy[Hostile] = st.one_of(
    st.builds(_request, st.just(True), USUAL_MESSAGES, st.just({}), st.just(False)),
    st.builds(_request, st.just(True), USUAL_MESSAGES, FEW_OPTIONS, st.booleans()),
    st.builds(_request, st.just(True), MESSAGES, FEW_OPTIONS, st.just(False)),
    st.builds(
        _request,
        st.just(False),
        st.one_of(TEXTS, st.lists(TEXTS), JSON),
        FEW_OPTIONS,
        st.booleans(),
    ),
    st.builds(_request, st.booleans(), USUAL_MESSAGES, OPTIONS, st.booleans()),
    st.builds(
        Hostile,
        st.sampled_from(["chat/completions", "completions"]),
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from([b"[" * 5000, b'{"prompt":1e999}', b"1" * 5000, b"null", b'{"a":']),
            st.builds(lambda value: json.dumps(value).encode("utf-16"), JSON),
        ),
    ),
)


@dataclass
class HostileRun:
    """A served champion that is asked, and what its answers were.

    texts: the answer of each version, by prompt. statuses: how many answers had which.
    """

    client: Client
    registry: Path
    runs: dict[int, Path]
    asking: openai.OpenAI
    texts: dict[tuple[str, str], str] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)

    def swap(self, seed: int) -> None:
        """Promote the run of a seed, wait until it is served, and keep what it answers."""
        version = promote_run(self.runs[seed], self.registry)
        wait_until(lambda: self.client.health()["names"][NAME]["version"] == version, "it swapped")
        self.note_answers(version)

    def note_answers(self, version: str) -> None:
        """Keep the answers of the version that is served."""
        for prompt in PROMPTS:
            reply = self.client.chat(NAME, prompt, max_tokens=MAX_TOKENS)
            assert reply.version == version
            self.texts[version, prompt] = reply.text

    def ask(self, hostile: Hostile) -> None:
        """Ask once. An answer is its version's own; a refusal is 4xx as the library shows it."""
        if hostile.leaves:
            self._ask_and_leave(hostile)
            return
        is_dictionary = isinstance(hostile.body, dict)
        body = encode(hostile.body)
        try:
            raw = self.asking.post(
                f"/{hostile.route}",
                cast_to=httpx.Response,
                content=body,
                options={"headers": {"Content-Type": "application/json"}},
            )
        except openai.APIStatusError as error:
            self.statuses[error.status_code] += 1
            _require_shown_refusal(hostile, error)
            return
        self.statuses[raw.status_code] += 1
        version = raw.headers["X-Adapter-Version"]
        assert is_dictionary, hostile
        self._compare(hostile, version, raw.text)

    def _compare(self, hostile: Hostile, version: str, text: str) -> None:
        """Where a request was a plain question, its answer is that of the version it names."""
        assert isinstance(hostile.body, dict)
        plain = {"messages", "max_tokens"}
        if set(hostile.body) != plain:
            return
        (message,) = hostile.body["messages"][-1:]
        known = self.texts.get((version, str(message.get("content"))))
        if known is not None and len(hostile.body["messages"]) == 1 and message["role"] == "user":
            answer = json.loads(text)["choices"][0]["message"]["content"] or ""
            assert answer == known, hostile

    def _ask_and_leave(self, hostile: Hostile) -> None:
        host, port = self.client.server.address.removeprefix("http://").split(":")
        body = encode(hostile.body)
        head = f"POST /v1/{hostile.route} HTTP/1.1\r\nContent-Length: {len(body) + 1}\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(head.encode() + body + b" ")

    def require_sound(self) -> None:
        """The server lives, has the champion, and says so; nothing was rolled back or barred."""
        wait_until(lambda: not self.client.server.generator.under_way, "nothing is under way")
        health = self.client.health()
        champion = read_champion(self.registry, NAME)
        served = health["names"][NAME]
        assert (health["status"], health["problems"]) == ("ok", [])
        assert (served["version"], served["refused"]) == (champion, None)
        assert self.client.server.generator.names[NAME].failures.failed == 0
        assert "rollback" not in (self.registry / NAME / "history.jsonl").read_text()
        reply = self.client.chat(NAME, PROMPTS[0], max_tokens=MAX_TOKENS)
        assert reply.text == self.texts[str(champion), PROMPTS[0]]
        sampled = self.client.chat(NAME, PROMPTS[0], max_tokens=MAX_TOKENS, temperature=1.0)
        assert (sampled.status, sampled.version) == (200, champion)


def _require_shown_refusal(hostile: Hostile, error: openai.APIStatusError) -> None:
    """What the library shows of a refusal: the client's fault, with the reason."""
    assert 400 <= error.status_code < 500, (hostile, error)
    assert isinstance(error.body, dict), (hostile, error)
    assert set(error.body) == {"message", "type", "code"}, hostile
    assert error.body["message"], hostile
    assert error.body["message"] in error.message, hostile


def encode(body: dict[str, Any] | bytes) -> bytes:
    """The body as it is sent; json.dumps writes NaN, large integers and half characters."""
    return body if isinstance(body, bytes) else json.dumps(body).encode()


@contextmanager
def hostile_run(registry: Path, runs: dict[int, Path]) -> Iterator[HostileRun]:
    """A server of the run of seed 1, and OpenAI's client of it."""
    version = promote_run(runs[1], registry)
    flags = ("--name", NAME, "--log-level", "ERROR")
    with serving(settings(registry, *flags)) as client:
        address = f"{client.server.address}/v1"
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60) as asking:
            run = HostileRun(client, registry, runs, asking)
            run.note_answers(version)
            yield run


def ask_over_two_swaps(registry: Path, runs: dict[int, Path], count: int) -> Counter[int]:
    """Ask so many drawn requests of each of three champions; how many answers had which status."""
    with hostile_run(registry, runs) as run:
        _ask_drawn(run, count)
        for seed in (2, 1):
            run.swap(seed)
            _ask_drawn(run, count)
    return run.statuses


def _ask_drawn(run: HostileRun, count: int) -> None:
    """One that fails is not made smaller: the server has seen it, and may answer otherwise."""

    @hypothesis_settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(REQUESTS)
    def ask(hostile: Hostile) -> None:
        run.ask(hostile)

    ask()
    run.require_sound()
