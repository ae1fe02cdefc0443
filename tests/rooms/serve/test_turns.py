"""A client who asks for a million tokens waits, and not the others."""

from __future__ import annotations

import gc
import json
import socket
import statistics
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from nested_core.rooms.serve import engine, fair_batches
from tests.rooms.serve.versions import CHAT, NAME, NO_END, QUESTION, Client, serving, settings
from tests.waiting import wait_until

pytestmark = pytest.mark.slow("serves a model")


def test_a_cache_that_lacks_last_tokens_is_kept_for_those_that_it_has() -> None:
    """As after an answer with a draft model, of which mlx_lm names all tokens."""
    prompt_cache = engine.PartialPromptCache(4)
    prompt_cache.count_paused = lambda: 0
    tokens = list(range(12))
    layers = [KVCache(), KVCache()]
    for layer, length in zip(layers, (11, 10), strict=True):
        layer.update_and_fetch(*(mx.ones((1, 2, length, 8)) for _ in range(2)))
    prompt_cache.insert_cache("model", tokens, layers)
    found, rest = prompt_cache.fetch_nearest_cache("model", [*tokens, 99])
    assert [layer.offset for layer in found] == [10, 10]
    assert rest == [10, 11, 99]


def test_an_answer_has_no_more_tokens_than_the_context_has_room_for(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.server.generator.model_provider.request_tokenizer, "_context", 64)
    reply = client.chat(NAME, **NO_END).json()
    usage, reason = reply["usage"], reply["choices"][0]["finish_reason"]
    assert (usage["total_tokens"], reason) == (64, "length")


@contextmanager
def asking_without_end(client: Client, model: str, prompt: str = QUESTION) -> Iterator[list[str]]:
    """Somebody who asks for a million tokens; what has come of the answer."""
    given: list[str] = []
    body = {"messages": [{"role": "user", "content": prompt}], "stream": True} | NO_END
    content = json.dumps(body | {"model": model}).encode()
    with client.connect() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        lines = connection.makefile("rb")

        def read() -> None:
            with suppress(ConnectionError):  # which the end may be
                for line in lines:
                    if line.startswith(b"data: {"):
                        piece = json.loads(line[6:])["choices"][0]
                        given.append(piece["delta"].get("content", ""))

        thread = threading.Thread(target=read)
        thread.start()
        yield given
        connection.shutdown(socket.SHUT_RDWR)
        thread.join()
        lines.close()


@pytest.fixture
def base_under_way(client: Client) -> Iterator[list[str]]:
    """Somebody who asks the base for a million tokens; what has come of the answer."""
    with asking_without_end(client, f"{NAME}@base") as given:
        wait_until(lambda: len(given) > engine.TURN_TOKENS, "the base answers")
        yield given
    wait_until(lambda: not client.server.generator.under_way, "nothing is under way")


@pytest.mark.parametrize("more", [{}, {"seed": 5, "temperature": 1.0}, {"stream": True}])
def test_the_champion_answers_while_the_base_is_asked_for_a_million_tokens(
    client: Client, base_under_way: list[str], more: dict[str, Any]
) -> None:
    before = len(base_under_way)
    for _ in range(4):
        assert client.chat(NAME, max_tokens=4, **more).status == 200
    wait_until(lambda: len(base_under_way) > before + engine.TURN_TOKENS, "the base goes on")
    under_way = client.server.generator.under_way
    wait_until(
        lambda: [request.version.version for request in list(under_way.values())] == ["base"],
        "the base alone is under way",
    )


def test_a_new_request_waits_for_few_tokens_of_a_longer_answer_of_another_version(
    client: Client, base_under_way: list[str]
) -> None:
    wait_until(lambda: len(base_under_way) > fair_batches.FIRST_TOKENS, "it is a longer answer")
    (base,) = client.server.generator.under_way.values()
    gained = []
    for _ in range(6):
        before = base.given_tokens
        assert client.chat(NAME, max_tokens=4).status == 200
        gained.append(base.given_tokens - before)
    assert statistics.median(gained) < engine.TURN_TOKENS / 2, gained


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"seed": 5, "temperature": 1.0},
        {"seed": 2**64 - 1, "temperature": 0.7, "top_p": 0.9, "xtc_probability": 0.5},
        {"seed": 5, "temperature": 1.0, "repetition_penalty": 1.3, "presence_context_size": 30}
        | {"presence_penalty": 0.5, "frequency_penalty": 0.5, "frequency_context_size": 0},
    ],
)
def test_an_answer_in_turns_is_the_one_without(
    client: Client, monkeypatch: Any, more: dict[str, Any]
) -> None:
    """Its text, its tokens and its log probabilities, and the stop text that ends it."""
    asked: dict[str, Any] = NO_END | {"max_tokens": 100, "logprobs": True} | more
    prompt = "Où est Zürich? I want to see 日本."
    alone = client.chat(NAME, prompt, **asked).json()
    stop = alone["choices"][0]["message"]["content"][60:64]
    stopped = client.chat(NAME, prompt, **asked, stop=stop).json()
    turns: list[int] = []
    monkeypatch.setattr(engine, "TURN_TOKENS_BESIDE_NEW", 7)  # the least after which it is asked

    def has_to_wait(generator: Any, request: Any) -> bool:
        turns.append(len(request.tokenized[0]))
        return True

    monkeypatch.setattr(engine.VersionedGenerator, "_has_to_wait", has_to_wait)
    whole = client.chat(NAME, prompt, **asked).json()
    assert len(set(turns)) == 14  # 100 tokens in turns of 7
    assert whole["usage"]["completion_tokens"] == 100
    assert whole["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert whole["choices"][0]["message"] == alone["choices"][0]["message"]
    assert whole["choices"][0]["finish_reason"] == "length"
    first, second = (
        [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]
        for answer in (alone, whole)
    )
    assert second == pytest.approx(first, abs=1e-3)
    again = client.chat(NAME, prompt, **asked, stop=stop).json()
    assert again["choices"][0]["message"] == stopped["choices"][0]["message"]
    assert again["choices"][0]["finish_reason"] == "stop"


def test_the_next_client_has_an_answer_where_all_places_of_a_batch_are_taken(
    version_and_registry: tuple[str, Path],
) -> None:
    """Each of the long answers goes on afterwards."""
    flags = ("--name", NAME, "--decode-concurrency", 2, "--prompt-concurrency", 1)
    with serving(settings(version_and_registry[1], *flags)) as client, ExitStack() as stack:
        answers = [stack.enter_context(asking_without_end(client, NAME)) for _ in range(3)]
        wait_until(lambda: all(answers), "three answers have begun, in two places")
        for _ in range(4):
            assert client.chat(NAME, max_tokens=4).status == 200
        under_way = client.server.generator.under_way
        wait_until(lambda: len(under_way) == 3, "the three alone are under way")
        before = [len(given) for given in answers]
        wait_until(
            lambda: all(len(given) > n + 32 for given, n in zip(answers, before, strict=True)),
            "all three go on",
        )


@pytest.mark.parametrize(("slow_step", "is_apart"), [(0.0, True), (1e9, False)])
def test_a_short_answer_is_there_before_long_ones_have_as_many_tokens(
    client: Client, monkeypatch: pytest.MonkeyPatch, slow_step: float, is_apart: bool
) -> None:
    """Apart, its tokens have two thirds of the time; with the others, all have as many."""
    monkeypatch.setattr(fair_batches, "SLOW_STEP", slow_step)
    client.chat(NAME)  # so that a small step was seen
    under_way = client.server.generator.under_way
    with ExitStack() as stack:
        long = [stack.enter_context(asking_without_end(client, NAME)) for _ in range(12)]
        first = fair_batches.FIRST_TOKENS
        wait_until(lambda: all(len(given) > first for given in long), "all are longer answers")
        requests = list(under_way.values())
        gained = []
        for _ in range(5):
            before = sum(one.given_tokens for one in requests)
            reply = client.chat(NAME, max_tokens=32, logit_bias=NO_END["logit_bias"])
            assert reply.json()["usage"]["completion_tokens"] == 32
            gained.append((sum(one.given_tokens for one in requests) - before) / len(long))
        assert (statistics.median(gained) < 26) is is_apart, gained
    wait_until(lambda: not under_way, "nothing is under way")
    left = [one for one in gc.get_objects() if isinstance(one, fair_batches.FairBatchGenerator)]
    wait_until(lambda: not any(len(one._longer) for one in left), "no batch has gone clients")


@pytest.mark.parametrize(
    ("linger", "seed"), [(None, None), (0, None), (0, 7)], ids=["closed", "reset", "reset, alone"]
)
def test_a_prompt_whose_client_is_gone_is_not_computed(
    version_and_registry: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    linger: int | None,
    seed: int | None,
) -> None:
    monkeypatch.setattr(engine, "SECONDS_BETWEEN_LOOKS_AT_CLIENT", 0.05)
    told, find_gone = list[tuple[int, int]](), fair_batches.FairBatchGenerator._find_gone

    def note_gone(batches: fair_batches.FairBatchGenerator) -> list[int]:
        gone = find_gone(batches)
        told.extend((id(batches), uid) for uid in gone)
        return gone

    monkeypatch.setattr(fair_batches.FairBatchGenerator, "_find_gone", note_gone)
    flags = ("--name", NAME, "--prompt-concurrency", 2, "--prefill-step-size", 4)
    with serving(settings(version_and_registry[1], *flags)) as client:
        under_way, seen = client.server.generator.under_way, dict[int, engine.VersionedRequest]()
        for number in range(8):
            text = f"{number} " + "Where to? " * 600
            asked = {"messages": [{"role": "user", "content": text}], "seed": seed}
            body = json.dumps(asked).encode()
            with client.connect() as connection:
                if linger is not None:
                    value = struct.pack("ii", 1, linger)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)
                head = f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                wait_until(lambda: len({*under_way} - {*seen}) > 0, "it is under way")
                seen.update(under_way)
        wait_until(lambda: not under_way, "all clients were found to be gone")
        assert client.chat(NAME, max_tokens=4).status == 200
        first, *others = (one.given_tokens for one in seen.values())
        assert (first <= 1, others) == (True, [0] * 7)  # alone the first is asked after its prompt
        batches = [x for x in gc.get_objects() if isinstance(x, fair_batches.FairBatchGenerator)]
        left = [len(one._prompt_batch) + len(one._unprocessed_sequences) for one in batches]
        assert not any(left), "no batch has their prompts"
        assert len(told) == len({*told}), "each is told once, and the others' answers go on"


def test_a_client_that_leaves_while_its_answer_is_paused_stops_nobody(
    version_and_registry: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken from the queue then, and waits for the other version's batch to end."""
    monkeypatch.setattr(engine, "SECONDS_BETWEEN_LOOKS_AT_CLIENT", 0.05)
    flags = ("--name", NAME, "--prefill-step-size", 4)
    with serving(settings(version_and_registry[1], *flags)) as client, ThreadPoolExecutor() as pool:
        under_way = client.server.generator.under_way
        with asking_without_end(client, NAME) as given:
            wait_until(lambda: len(given) > 2 * engine.TURN_TOKENS, "it is a longer answer")
            (long,) = under_way.values()
            base, text = f"{NAME}@base", "Where to? " * 400
            other = pool.submit(client.chat, base, text, max_tokens=4)
            wait_until(lambda: long.is_paused and len(under_way) > 1, "it waits for the other")
        assert other.result().status == 200
        wait_until(lambda: not under_way, "nothing is under way")
        for model in (NAME, base, NAME):
            assert client.chat(model, max_tokens=4).status == 200


def test_answers_that_have_no_place_take_turns_and_new_ones_go_first(
    version_and_registry: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LONG_TURN_TOKENS", 32)
    monkeypatch.setattr(fair_batches, "SLOW_STEP", 0.0)
    flags = ("--name", NAME, "--decode-concurrency", 2, "--prompt-concurrency", 1)
    with serving(settings(version_and_registry[1], *flags)) as client, ExitStack() as stack:
        long = [stack.enter_context(asking_without_end(client, NAME)) for _ in range(6)]
        wait_until(lambda: all(len(given) > 150 for given in long), "all six get on")
        under_way = list(client.server.generator.under_way.values())
        before = sum(one.given_tokens for one in under_way)
        for _ in range(4):
            assert client.chat(NAME, max_tokens=4).status == 200
        assert sum(one.given_tokens for one in under_way) - before < 4 * 64


def test_answers_that_wait_keep_what_was_computed_however_many_they_are(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = client.server.generator
    cache, lacked = generator.prompt_cache, []
    fetch = cache.fetch_nearest_cache

    def fetch_and_note(model: Any, tokens: list[int]) -> Any:
        found, rest = fetch(model, tokens)
        if len(tokens) > fair_batches.FIRST_TOKENS:
            lacked.append(len(rest))
        return found, rest

    monkeypatch.setattr(cache, "fetch_nearest_cache", fetch_and_note)
    with ExitStack() as stack:
        base = f"{NAME}@base"
        long = [
            stack.enter_context(asking_without_end(client, base, f"Question {number}?"))
            for number in range(14)
        ]
        wait_until(lambda: all(len(one) > 100 for one in long), "all are longer answers")
        for _ in range(3):
            assert client.chat(NAME, max_tokens=2).status == 200
    wait_until(lambda: not generator.under_way, "nothing is under way")
    assert len(lacked) >= 28
    assert max(lacked) < 8, lacked
    for number in range(3):
        client.chat(NAME, f"Question {number}?", max_tokens=2)
    assert len(cache) <= 10  # as --prompt-cache-size says, once nobody waits
