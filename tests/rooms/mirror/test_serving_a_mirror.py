"""serve reads a registry in object storage: it follows its champion, and refuses what is torn."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from flows.cli import main
from nested_core.errors import ConfigError
from nested_core.registry import rollback
from nested_core.registry.mirroring import EVERY_VERSION, open_copy, set_mirror, update_copy
from nested_core.rooms.mirror.author import publish
from nested_core.rooms.mirror.object_storage import ObjectStorage
from nested_core.rooms.serve import follower
from tests.example import EXAMPLES
from tests.rooms.serve.conftest import base, runs
from tests.rooms.serve.versions import NAME, QUESTION, Client, promote_run, serving, settings
from tests.waiting import wait_until

__all__ = ["base", "runs"]
pytestmark = pytest.mark.slow("serves a registry whose champion changes")


def wait_for(client: Client, version: str) -> None:
    wait_until(lambda: client.health()["names"][NAME]["version"] == version, f"{version} is served")


@pytest.fixture
def served(runs, address: str, tmp_path: Path, monkeypatch) -> tuple[str, Path]:
    """A champion in a registry that is mirrored, and its registry."""
    monkeypatch.setattr(follower, "MIRROR_POLL_SECONDS", 0.2)
    monkeypatch.setattr(follower, "RETRY_SECONDS", 4.0)
    version = promote_run(runs[1], tmp_path / "registry")
    set_mirror(tmp_path / "registry" / NAME, address)
    publish(tmp_path / "registry" / NAME, address)
    return version, tmp_path / "registry"


def test_a_server_follows_a_mirror_and_keeps_its_champion_where_that_is_torn(
    served, runs, address
) -> None:
    first, registry = served
    with serving(settings(Path("unused"), "--registry", address, "--name", NAME)) as client:
        wait_for(client, first)
        second = promote_run(runs[2], registry)
        wait_for(client, second)
        rollback(registry, NAME, by="ann")
        wait_for(client, first)
        # A version that the server has not read is fetched where it is asked for by its name
        third = promote_run(runs[3], registry)
        rollback(registry, NAME, by="ann")
        assert client.chat(f"{NAME}@{third[:12]}").version == third
        storage, key = ObjectStorage(address), f"{NAME}/champion.json"
        pointer, tag = storage.read(key, 10**6)
        torn = json.dumps(json.loads(pointer) | {"history": "0" * 64})
        storage.replace(key, torn.encode(), tag)
        wait_until(lambda: any("is torn" in told for told in client.health()["problems"]))
        assert client.health()["names"][NAME]["version"] == first
        assert client.chat().version == first
        storage.replace(key, pointer, storage.read(key, 10**6)[1])
        wait_until(lambda: client.health()["problems"] == [])
        wait_for(client, promote_run(runs[4], registry))


def test_a_server_heals_its_copy_and_tries_a_torn_champion_now_and_then(
    served, runs, address, monkeypatch
) -> None:
    first, registry = served
    second = promote_run(runs[2], registry)
    copy, fetch, attempts = open_copy(address), ObjectStorage.fetch, list[str]()
    update_copy(copy, NAME, EVERY_VERSION)
    pinned, champion = (copy / NAME / "versions" / v / "gate.json" for v in (first, second))
    pinned.write_text("damaged")

    def note(self, key, target, **more):
        attempts.append(key)
        return fetch(self, key, target, **more)

    with serving(settings(Path("unused"), "--registry", address, "--name", NAME)) as client:
        wait_for(client, second)
        assert client.chat(f"{NAME}@{first[:12]}").version == first
        assert pinned.read_text() != "damaged"
        # A file of the champion is lost here, and torn there: one attempt, then a pause
        storage = ObjectStorage(address)
        listed = (stored.key for stored in storage.list_objects(""))
        lost = next(k for k in listed if second in k and k.endswith("gate.json"))
        content, _ = storage.read(lost, 10**6)
        storage.delete([lost])
        monkeypatch.setattr(ObjectStorage, "fetch", note)
        champion.unlink()
        wait_until(lambda: any("is torn" in told for told in client.health()["problems"]))
        time.sleep(2)
        assert attempts.count(lost) == 1
        assert client.chat().version == second
        storage.put(lost, content)
        wait_until(champion.exists)


def test_a_server_begins_with_what_was_read_before_where_the_mirror_is_away(
    served, address, server, monkeypatch, caplog
) -> None:
    first, _ = served
    with serving(settings(Path("unused"), "--registry", address, "--name", NAME)) as client:
        wait_for(client, first)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with serving(settings(Path("unused"), "--registry", address, "--name", NAME)) as client:
        wait_for(client, first)
        wait_until(lambda: client.health()["problems"] != [])
    assert "What was read from there before is served" in caplog.text
    wanted = settings(Path("unused"), "--registry", f"{address}-other", "--name", NAME)
    with pytest.raises(ConfigError, match="cannot be read"), serving(wanted):
        pass


def test_chat_and_evaluate_read_a_mirror(served, base, address, capfd) -> None:
    asked = ["--registry", address]
    assert main(["chat", NAME, *asked, "--prompt", QUESTION]) == 0
    assert "adapter" in capfd.readouterr().out
    assert main(["chat", f"{NAME}@{served[0][:8]}", *asked, "--prompt", QUESTION]) == 0
    assert main(["chat", f"{NAME}@abcdef12", *asked, "--prompt", QUESTION]) == 2
    assert "names no versions" in capfd.readouterr().err
    data = EXAMPLES / "geography" / "valid.jsonl"
    command = ["evaluate", NAME, *asked, "--data", str(data), "--model", str(base), "--json"]
    assert main(command) == 4  # it was made without training, and is worse than its base
    assert '"is_worse": true' in capfd.readouterr().out
