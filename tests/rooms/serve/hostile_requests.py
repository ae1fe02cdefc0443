"""Requests to `serve` drawn from OpenAI's schema and beyond it, asked while the champion changes.

A request is well formed, extreme, of wrong types, a body that is none, or one whose client leaves.
What has to hold for each is in `ask`; what has to hold of the server, in `HostileRun`. Meanwhile
another client asks plain questions, and looks at `/health`.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from nested_core.registry import read_champion
from tests.rooms.serve.versions import COUNTRIES, NAME, Client, promote_run, serving, settings
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


Leaves = Literal["never", "within the body", "before the answer"]
LEAVES: st.SearchStrategy[Leaves] = st.sampled_from(
    ["never", "never", "within the body", "before the answer"]
)


@dataclass(frozen=True)
class Hostile:
    """A request: of which route, with which body, and when its client goes away.

    body: a dictionary, or bytes that are sent as they are.
    """

    route: str
    body: dict[str, Any] | bytes
    leaves: Leaves = "never"


def _request(
    chat: bool, content: Any, options: dict[str, Any], leaves: Leaves, streamed: bool
) -> Hostile:
    route, key = ("chat/completions", "messages") if chat else ("completions", "prompt")
    body = {key: content, "max_tokens": MAX_TOKENS} | ({"stream": True} if streamed else {})
    return Hostile(route, body | options, leaves)


USUAL_MESSAGES = st.builds(
    lambda text: [{"role": "user", "content": text}], st.sampled_from(PROMPTS)
)
STREAMED = st.booleans()
REQUESTS: st.SearchStrategy[Hostile] = st.one_of(
    st.builds(_request, st.just(True), USUAL_MESSAGES, st.just({}), st.just("never"), STREAMED),
    st.builds(_request, st.just(True), USUAL_MESSAGES, FEW_OPTIONS, LEAVES, STREAMED),
    st.builds(_request, st.just(True), MESSAGES, FEW_OPTIONS, st.just("never"), STREAMED),
    st.builds(
        _request,
        st.just(False),
        st.one_of(TEXTS, st.lists(TEXTS), JSON),
        FEW_OPTIONS,
        LEAVES,
        STREAMED,
    ),
    st.builds(_request, st.booleans(), USUAL_MESSAGES, OPTIONS, LEAVES, STREAMED),
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
    compared: how many answers were compared with their version's, by version.
    """

    client: Client
    registry: Path
    runs: dict[int, Path]
    asking: openai.OpenAI
    texts: dict[tuple[str, str], str] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)

    def note_answers(self, version: str) -> None:
        """Keep the answers of a version."""
        for prompt in PROMPTS:
            reply = self.client.chat(f"{NAME}@{version}", prompt, max_tokens=MAX_TOKENS)
            assert reply.version == version
            self.texts[version, prompt] = reply.text

    def ask(self, hostile: Hostile) -> None:
        """Ask once. An answer is its version's own; a refusal is 4xx as the library shows it."""
        if hostile.leaves != "never":
            self._ask_and_leave(hostile)
            return
        try:
            version, text = self._ask(hostile)
        except openai.APIStatusError as error:
            self.statuses[error.status_code] += 1
            _require_shown_refusal(hostile, error)
            return
        self.statuses[200] += 1
        assert isinstance(hostile.body, dict), hostile
        if hostile.body.keys() - {"stream"} != {"messages", "max_tokens"}:
            return
        messages = hostile.body["messages"]
        if messages in [[{"role": "user", "content": prompt}] for prompt in PROMPTS]:
            assert text == self.texts[version, messages[0]["content"]], hostile
            self.compared[version] += 1

    def _ask(self, hostile: Hostile) -> tuple[str, str]:
        """The version that answers and its text, whole or streamed, as OpenAI's library has it.

        Raises what the library raises, also in the midst of a stream.
        """
        headers = {"headers": {"Content-Type": "application/json"}}
        options: Any = {"content": encode(hostile.body), "options": headers}
        path, is_chat = f"/{hostile.route}", hostile.route == "chat/completions"
        if not isinstance(hostile.body, dict) or hostile.body.get("stream") is not True:
            raw = self.asking.post(path, cast_to=httpx.Response, **options)
            choice = json.loads(raw.text)["choices"][0]
            text = choice["message"]["content"] if is_chat else choice["text"]
            return raw.headers["X-Adapter-Version"], text or ""
        kind = ChatCompletionChunk if is_chat else Completion
        stream_cls = openai.Stream[kind]  # type: ignore[valid-type]
        stream = self.asking.post(path, cast_to=kind, stream=True, stream_cls=stream_cls, **options)
        texts = [
            (piece.choices[0].delta.content if is_chat else piece.choices[0].text) or ""
            for piece in stream
            if piece.choices
        ]
        return stream.response.headers["X-Adapter-Version"], "".join(texts)

    def _ask_and_leave(self, hostile: Hostile) -> None:
        body = encode(hostile.body)
        head = f"POST /v1/{hostile.route} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        sent = body if hostile.leaves == "before the answer" else body[: len(body) // 2]
        with self.client.connect() as connection:
            connection.sendall(head.encode() + sent)

    def ask_plainly(self, is_over: threading.Event) -> None:
        """Ask plain questions, whole and streamed, and look at `/health`, until it is over."""
        for prompt, streamed in itertools.cycle(itertools.product(PROMPTS, (False, True))):
            if is_over.wait(0.1):
                return
            health = self.client.health()
            assert (health["status"], health["problems"]) == ("ok", [])
            message = [{"role": "user", "content": prompt}]
            options = {"stream": True} if streamed else {}
            body = {"messages": message, "max_tokens": MAX_TOKENS} | options
            self.ask(Hostile("chat/completions", body))

    def require_sound(self) -> None:
        """The server lives, has the champion, and says so; nothing was rolled back or barred."""
        wait_until(lambda: not self.client.server.generator.under_way, "nothing is under way")
        champion = read_champion(self.registry, NAME)
        wait_until(lambda: self.client.health()["names"][NAME]["version"] == champion, "followed")
        health = self.client.health()
        assert (health["status"], health["problems"]) == ("ok", [])
        assert health["names"][NAME]["refused"] is None
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


def ask_over_two_swaps(registry: Path, runs: dict[int, Path], count: int) -> HostileRun:
    """Ask so many drawn requests, while the champion changes to another version and back.

    It changes after a third of them and after two thirds, without a pause of the requests.
    """
    versions = {seed: promote_run(runs[seed], registry) for seed in (2, 1)}
    flags = ("--name", NAME, "--log-level", "ERROR")
    with serving(settings(registry, *flags)) as client:
        address = f"{client.server.address}/v1"
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60) as asking:
            run = HostileRun(client, registry, runs, asking)
            for version in versions.values():
                run.note_answers(version)
            is_over = threading.Event()
            with ThreadPoolExecutor() as pool:
                plain = pool.submit(run.ask_plainly, is_over)
                try:
                    _ask_drawn(run, count, swaps={count // 3: 2, 2 * count // 3: 1})
                finally:
                    is_over.set()
                plain.result()
            run.require_sound()
    assert set(run.compared) == set(versions.values())
    return run


def _ask_drawn(run: HostileRun, count: int, swaps: dict[int, int]) -> None:
    """Ask drawn requests; `swaps` has the seed that is promoted, by the request that it is before.

    One that fails is not made smaller: the server has seen it, and may answer otherwise.
    """
    asked = itertools.count()

    @hypothesis_settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(REQUESTS)
    def ask(hostile: Hostile) -> None:
        if (seed := swaps.get(next(asked))) is not None:
            champion = str(read_champion(run.registry, NAME))
            wait_until(lambda: run.compared[champion] > 0, "the champion before it has answered")
            promote_run(run.runs[seed], run.registry)
        run.ask(hostile)

    ask()
