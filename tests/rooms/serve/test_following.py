"""serve: a promotion reaches clients by itself, and each answer is of the version that it names."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate, load

from nested_core.errors import ConfigError
from nested_core.models.base_model import chat_template_digest, vocabulary_digest
from nested_core.registry import read_verified_version, rollback
from nested_core.registry.link_and_views import NameFolder
from nested_core.rooms.serve import follower
from tests.builders.adapter_folders import base_copy
from tests.builders.registering import register_and_promote
from tests.builders.rotten_files import rot
from tests.example import MODEL
from tests.rooms.serve.versions import (
    NAME,
    QUESTION,
    AdapterShape,
    Client,
    promote_run,
    quantise_base,
    record_canary,
    serving,
    settings,
    write_version_run,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.slow("serves a registry whose champion changes")

Promote = Callable[..., str]
SECONDS_ON_A_LOADED_MACHINE = 60.0  # a second or two on two quiet cores


def wait_for(client: Client, version: str, name: str = NAME) -> None:
    """Wait until a version was swapped in."""

    def is_served() -> bool:
        told = client.health()["names"][name]
        has_swapped = told["last_swap_seconds"] is not None and told["refused"] is None
        return bool(told["version"] == version and has_swapped)

    wait_until(is_served, f"{version} is served")


def status_without(client: Client, version: str) -> dict[str, Any]:
    """What is told of NAME once `version` is refused; AssertionError where it is served."""

    def status() -> dict[str, Any]:
        told: dict[str, Any] = client.health()["names"][NAME]
        return told

    wait_until(lambda: status()["refused"] is not None or status()["version"] == version)
    assert status()["version"] != version
    return status()


@cache
def expected(base: Path, run: Path | None, prompt: str = QUESTION) -> str:
    """What mlx_lm.generate answers."""
    adapter = None if run is None else str(run / "adapter")
    model, tokenizer = load(str(base), adapter_path=adapter)[:2]
    messages = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return generate(model, tokenizer, tokens, max_tokens=12).strip()


def arrays_of(model: Any) -> dict[str, mx.array]:
    leaves: Any = tree_flatten(model.parameters())
    return dict(leaves)


def test_after_each_promotion_the_next_answer_is_the_new_version_s(
    promote: Promote, runs: dict[int, Path], base: Path, registry: Path
) -> None:
    first = promote(1)
    answers = {}
    with serving(settings(registry, "--name", NAME)) as client:
        provider = client.server.generator.model_provider
        base_arrays = arrays_of(provider.base)
        reply = client.chat()
        assert (reply.status, reply.version) == (200, first)
        assert reply.json()["system_fingerprint"] == first
        answers[1] = [reply.text, client.chat(NAME).text]  # the second through the prompt cache
        for seed in (2, 3, 4):  # the same layers, others, DoRA
            version = promote(seed)
            promoted = time.monotonic()
            wait_for(client, version)
            reply = client.chat(NAME)
            assert (reply.status, reply.version) == (200, version)
            assert time.monotonic() - promoted < SECONDS_ON_A_LOADED_MACHINE
            cached = client.chat(NAME)
            assert cached.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
            answers[seed] = [reply.text, cached.text]
        after = arrays_of(provider.base)
        assert all(after[name] is array for name, array in base_arrays.items())
        rollback(registry, NAME, by="a test")
        wait_until(lambda: client.chat().text == answers[3][0], "the version before is back")
    for seed, texts in answers.items():
        assert {text.strip() for text in texts} == {expected(base, runs[seed])}
    assert len({texts[0] for texts in answers.values()}) == len(answers)


@pytest.mark.slow("trains all weights and serves them")
def test_a_full_fine_tune_is_served_and_leaves_the_base_as_it_was(
    promote: Promote, runs: dict[int, Path], base: Path, registry: Path, tmp_path: Path
) -> None:
    run = write_version_run(tmp_path / "full", base, 5, AdapterShape(fine_tune_type="full"))
    promote(1)
    with serving(settings(registry, "--name", NAME)) as client:
        version = promote_run(run, registry)
        wait_for(client, version)
        reply = client.chat(NAME)
        assert (reply.version, reply.text.strip()) == (version, expected(base, run))
        assert client.chat(f"{NAME}@base").text.strip() == expected(base, None)
        wait_for(client, promote(2))
        assert client.chat(NAME).text.strip() == expected(base, runs[2])


@pytest.mark.slow("quantises and loads a base")
def test_adapters_of_a_quantised_base_are_served(base, registry, tmp_path) -> None:
    small = quantise_base(base, tmp_path / "base-4-bits")
    paths = [write_version_run(tmp_path / f"run-{seed}", small, seed) for seed in (1, 2)]
    record_canary(paths[1], small)
    promote_run(paths[0], registry)
    with serving(settings(registry, "--name", NAME)) as client:
        assert client.chat(NAME).text.strip() == expected(small, paths[0])
        wait_for(client, promote_run(paths[1], registry))
        assert client.chat(NAME).text.strip() == expected(small, paths[1])


def test_a_version_and_the_base_are_asked_by_name(promote, runs, base, registry) -> None:
    old, new = promote(1), promote(2)
    other = promote(3, "rivers")
    with serving(settings(registry, "--name", NAME, "rivers")) as client:
        listed = [model["id"] for model in client.send("GET", "/v1/models").json()["data"]]
        assert set(listed) == {
            NAME,
            f"{NAME}@base",
            f"{NAME}@{old}",
            f"{NAME}@{new}",
            "rivers",
            "rivers@base",
            f"rivers@{other}",
        }
        asked = {
            NAME: (new, runs[2]),
            f"{NAME}@{old}": (old, runs[1]),
            f"{NAME}@{old[:8]}": (old, runs[1]),
            "rivers": (other, runs[3]),
            "rivers@base": ("base", None),
        }
        for model, (version, run) in asked.items():
            reply = client.chat(model)
            assert (reply.version, reply.text.strip()) == (version, expected(base, run)), model
            assert reply.json()["model"] == model
        reply = client.send("POST", "/v1/completions", {"prompt": "1", "max_tokens": 1})
        assert reply.json()["model"] == NAME
        for unknown in ("someone/a-model", f"{NAME}@{'0' * 64}", "/etc", f"{NAME}@champion"):
            reply = client.chat(unknown)
            assert reply.status == 404
            assert "error" in reply.json()
        names = client.health()["names"]
        assert {name: status["requests"] for name, status in names.items()} == {
            NAME: 4,
            "rivers": 2,
        }


def note_reads(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[], None] = lambda: None
) -> list[str]:
    """The versions that are read from disk from now on; `before` each, something is done."""
    read: list[str] = []
    read_version = read_verified_version

    def note(registry: Path, name: str, version: str) -> Any:
        read.append(version)
        before()
        return read_version(registry, name, version)

    monkeypatch.setattr(follower, "read_verified_version", note)
    return read


@pytest.mark.slow("a server of its own")
def test_a_version_asked_for_by_its_first_digits_is_read_from_disk_once(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = promote(1), promote(2)
    with serving(settings(registry, "--name", NAME)) as client:
        read = note_reads(monkeypatch)
        for version in (old, new, old, new):
            assert client.chat(f"{NAME}@{version[:8]}").version == version
    assert read == [old]


@pytest.mark.slow("a server of its own")
def test_who_asks_for_a_version_at_once_shares_one_and_the_champion_answers_meanwhile(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = promote(1), promote(2)
    with serving(settings(registry, "--name", NAME)) as client:
        have_come, may_go_on = threading.Event(), threading.Event()

        def wait() -> None:
            have_come.set()
            assert may_go_on.wait(60)

        read = note_reads(monkeypatch, wait)
        find = client.server.follower.find_version
        with ThreadPoolExecutor(8) as pool:
            first = [pool.submit(find, NAME, old) for _ in range(8)]
            try:
                assert have_come.wait(60)
                assert client.chat().version == new
                time.sleep(0.2)  # in which the others come
            finally:
                may_go_on.set()
            versions = [one.result() for one in first]
    assert read == [old]
    assert len({id(version) for version in versions}) == 1


@pytest.mark.slow("a server of its own")
def test_versions_of_answers_under_way_are_bounded_and_none_is_there_twice(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [promote(seed) for seed in (1, 2, 3, 4)]
    monkeypatch.setattr(follower, "MAX_PINNED_VERSIONS", 1)
    monkeypatch.setattr(follower, "MAX_VERSIONS_IN_MEMORY", 2)
    with serving(settings(registry, "--name", NAME)) as client:
        find = client.server.follower.find_version
        held = [find(NAME, version) for version in versions[:2]]
        assert find(NAME, versions[0]) is held[0]
        refused = client.chat(f"{NAME}@{versions[2]}")
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "Answers of 2 older versions are under way" in refused.body
        assert client.chat().version == versions[3]
        held.clear()
        assert client.chat(f"{NAME}@{versions[2]}").version == versions[2]


def test_a_damaged_champion_is_not_served_and_the_old_one_stays(promote, registry) -> None:
    first = promote(1)
    with serving(settings(registry, "--name", NAME)) as client:
        before = client.chat().text
        damaged = promote_damaged(promote, registry)
        status = status_without(client, damaged)
        assert status["version"] == first
        assert status["refused"]["version"] == damaged
        assert "is not what was registered" in status["refused"]["reason"]
        reply = client.chat()
        assert (reply.version, reply.text) == (first, before)
        pinned = client.chat(f"{NAME}@{damaged}")
        assert "is not what was registered" in pinned.json()["error"]["message"]
        third = promote(3)
        wait_for(client, third)


def test_a_champion_of_another_base_is_not_served(promote, registry, tmp_path) -> None:
    """The same model in another precision is another base."""
    first = promote(1)
    other = write_version_run(tmp_path / "other", MODEL, seed=9)
    with serving(settings(registry, "--name", NAME)) as client:
        second = promote_run(other, registry)
        status = status_without(client, second)
        assert (status["version"], status["refused"]["version"]) == (first, second)
        assert "was made for the base sha256:" in status["refused"]["reason"]
        assert client.chat().version == first
        assert (
            "was made for the base sha256:"
            in client.chat(f"{NAME}@{second}").json()["error"]["message"]
        )


def test_a_base_that_rotted_after_the_promotion_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_CACHE", str(tmp_path / "cache"))
    base = base_copy(tmp_path / "base")
    promote_run(write_version_run(tmp_path / "run", base, seed=1), tmp_path / "registry")
    wanted = settings(tmp_path / "registry", "--name", NAME)
    with serving(wanted) as client:
        assert client.chat().status == 200
    rot(base / "model.safetensors", -1, monkeypatch)
    with pytest.raises(ConfigError, match="was made for the base sha256:"), serving(wanted):
        pass


def promote_damaged(promote: Promote, registry: Path) -> str:
    """Promote a version, with a byte of its tensors changed before the link leads to it."""
    move_link = NameFolder._move_link

    def damage_and_move(held: NameFolder, champion: str) -> None:
        weights = held.version_path(champion) / "adapters.safetensors"
        weights.chmod(0o644)
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        move_link(held, champion)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NameFolder, "_move_link", damage_and_move)
        return promote(2)


@pytest.mark.slow("asks a server from several threads")
def test_no_answer_is_mixed_under_load(promote, runs, base, registry) -> None:
    seeds = {promote(seed): seed for seed in (1, 2)}
    prompts = [f"I want to see {country}. Where to?" for country in ("Italy", "Fiji", "Peru")]
    right = {
        (version, prompt): expected(base, runs[seed], prompt)
        for version, seed in seeds.items()
        for prompt in prompts
    }
    wrong: list[str] = []
    answered: list[str] = []
    is_over = threading.Event()

    def ask(client: Client, prompt: str) -> None:
        while not is_over.is_set():
            reply = client.chat(NAME, prompt)
            if reply.status != 200 or reply.text.strip() != right[str(reply.version), prompt]:
                wrong.append(f"{reply}")
            answered.append(str(reply.version))

    with serving(settings(registry, "--name", NAME)) as client:
        threads = [threading.Thread(target=ask, args=(client, prompt)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for seed in (1, 2, 1):
            version = promote(seed)
            wait_for(client, version)
            seen = len(answered)
            wait_until(lambda count=seen: len(answered) > count + 3, "answers of the new version")  # type: ignore[misc]
        is_over.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert set(answered) == set(seeds)
    assert answered[-1] == version


@pytest.mark.parametrize(
    ("key", "what"), [("chat_template", "chat template"), ("vocabulary", "tokenizer")]
)
def test_a_version_of_another_tokenizer_is_not_served(runs, base, tmp_path, key, what) -> None:
    trained_with = {
        "chat_template": chat_template_digest(base),
        "vocabulary": vocabulary_digest(base),
    }
    register_and_promote(runs[1], tmp_path / "same", NAME, trained_with, by="a test")
    with serving(settings(tmp_path / "same", "--name", NAME)) as client:
        assert client.chat(NAME).status == 200
    other = trained_with | {key: "0" * 64}
    register_and_promote(runs[1], tmp_path / "other", NAME, other, by="a test")
    with (
        pytest.raises(ConfigError, match=f"was trained with another {what} than"),
        serving(settings(tmp_path / "other", "--name", NAME)),
    ):
        pass
