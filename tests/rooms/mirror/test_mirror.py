"""A registry in object storage, on a real S3 server: its author, its readers, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread

import pytest

from flows.cli import main
from nested_core.errors import ConfigError, DamagedError
from nested_core.registry import (
    check_champion,
    list_versions,
    read_champion,
    read_verified_version,
    rollback,
)
from nested_core.registry.folders import list_names
from nested_core.registry.ledger import read_ledger
from nested_core.registry.mirroring import (
    EVERY_VERSION,
    open_copy,
    read_mirror_note,
    set_mirror,
    update_copy,
)
from nested_core.rooms.housekeeping.garbage_collection import collect_garbage
from nested_core.rooms.housekeeping.registry_audit import audit
from nested_core.rooms.mirror import author as author_module
from nested_core.rooms.mirror.author import publish
from nested_core.rooms.mirror.object_storage import ObjectStorage, StorageError
from tests.builders.registering import register
from tests.core.registry.conftest import write_run
from tests.example import DATA, MODEL
from tests.rooms.mirror.conftest import NAME, promote_new
from tests.rooms.mirror.s3_server import FaultyProxy, with_users


def read_copy(address: str) -> str | None:
    """The champion of the mirror, verified as a server verifies it."""
    copy = open_copy(address)
    update_copy(copy, NAME)
    champion = read_champion(copy, NAME)
    if champion is not None:
        assert read_verified_version(copy, NAME, champion).version == champion
    return champion


def begin_mirror(registry: Path, address: str) -> None:
    set_mirror(registry / NAME, address)
    publish(registry / NAME, address)


def objects(address: str) -> dict[str, int]:
    return {stored.key: stored.size for stored in ObjectStorage(address).list_objects("")}


def test_promotions_and_rollbacks_are_read_from_the_mirror(registry, address) -> None:
    begin_mirror(registry, address)
    first, second = sorted(list_versions(registry, NAME), key=lambda v: v == read_copy(address))
    assert read_copy(address) == second == read_champion(registry, NAME)
    rollback(registry, NAME, by="ann")
    assert read_copy(address) == first
    third = promote_new(registry, 3)
    assert read_copy(address) == third
    copy = open_copy(address)
    update_copy(copy, NAME, EVERY_VERSION)
    assert audit(copy, NAME).is_sound
    assert list_versions(copy, NAME) == list_versions(registry, NAME)
    assert (copy / NAME / "history.jsonl").read_bytes() == (
        registry / NAME / "history.jsonl"
    ).read_bytes()
    assert not (copy / NAME / "data").exists()


def test_the_commands_read_an_address(registry, address, capfd) -> None:
    assert main(["registry", "mirror", str(registry), "--to", address]) == 0
    assert "12 files put" in capfd.readouterr().out
    assert main(["history", NAME, "--registry", address, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["champion"] == read_champion(registry, NAME)
    assert [line["action"] for line in told["history"]] == ["promote", "promote"]
    assert len(told["losses"]) == 2
    assert main(["audit", NAME, "--registry", address, "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["versions"]) == 2
    assert main(["gc", NAME, "--registry", address]) == 2
    assert "is an address, where nothing is read or written" in capfd.readouterr().err
    assert main(["registry", str(registry)]) == 0
    assert main(["registry", str(registry), "--to", address]) == 2
    (registry / NAME / "mirror.json").unlink()
    capfd.readouterr()
    assert main(["registry", "mirror", str(registry)]) == 2
    assert "has no name that is mirrored" in capfd.readouterr().err
    assert main(["registry", "mirror", str(registry), "--to", "s3://key:word@bucket"]) == 2
    assert "word" not in capfd.readouterr().err


def test_a_champion_of_the_right_sizes_and_wrong_bytes_is_put_again_by_hand(
    registry, address, capfd
) -> None:
    begin_mirror(registry, address)
    storage, champion = ObjectStorage(address), str(read_champion(registry, NAME))
    history = next(key for key in objects(address) if "/history/" in key)
    for key in (next(k for k in objects(address) if champion in k and "gate" in k), history):
        content, _ = storage.read(key, 10**6)
        storage.put(key, b"x" * len(content))
    with pytest.raises(DamagedError):
        read_copy(address)
    assert main(["registry", "mirror", str(registry)]) == 0
    assert "12 files put" in capfd.readouterr().out
    assert read_copy(address) == champion


def damage(address: str, version: str) -> None:
    """Change a byte of a version's weights in the bucket."""
    storage = ObjectStorage(address)
    key = next(k for k in objects(address) if version in k and k.endswith(".safetensors"))
    content, _ = storage.read(key, 10**9)
    storage.put(key, content[:-1] + bytes([content[-1] ^ 1]))


def test_an_old_version_that_is_damaged_there_is_named_and_put_again_by_hand(
    registry, address, capfd, caplog
) -> None:
    begin_mirror(registry, address)
    (old,) = {*list_versions(registry, NAME)} - {read_champion(registry, NAME)}
    damage(address, old)
    assert main(["history", NAME, "--registry", address]) == 0  # of all that can be read
    assert main(["audit", NAME, "--registry", address, "--json"]) == 6
    assert old in capfd.readouterr().out
    assert "is not what its history records" in caplog.text
    copy = open_copy(address)
    with pytest.raises(DamagedError, match="registry mirror` on the author's"):
        update_copy(copy, NAME, old)
    assert main(["registry", "mirror", str(registry)]) == 0
    update_copy(copy, NAME, old)
    assert main(["audit", NAME, "--registry", address]) == 0


def test_going_back_puts_its_target_again(registry, address) -> None:
    begin_mirror(registry, address)
    (old,) = {*list_versions(registry, NAME)} - {read_champion(registry, NAME)}
    damage(address, old)
    rollback(registry, NAME, by="ann")
    assert read_copy(address) == old


def test_an_old_version_that_the_author_lost_is_said_and_left_out(
    registry, address, caplog, capfd
) -> None:
    champion = read_champion(registry, NAME)
    (old,) = {*list_versions(registry, NAME)} - {champion}
    shutil.rmtree(registry / NAME / "versions" / old)
    begin_mirror(registry, address)
    assert "Not put into the mirror" in caplog.text
    assert old in caplog.text
    assert main(["history", NAME, "--registry", address]) == 0
    capfd.readouterr()
    assert main(["audit", NAME, "--registry", address, "--json"]) == 6
    assert old in capfd.readouterr().out
    assert read_copy(address) == champion


def test_a_slow_fetch_of_one_version_holds_up_no_other(registry, address, monkeypatch) -> None:
    """As where a server is asked for NAME@OLD while it follows the champion."""
    begin_mirror(registry, address)
    champion, copy = read_champion(registry, NAME), open_copy(address)
    (old,) = {*list_versions(registry, NAME)} - {champion}
    update_copy(copy, NAME)
    fetch, has_begun, may_end = ObjectStorage.fetch, Event(), Event()

    def fetch_slowly(self, key, target, **more):
        if old in key:
            has_begun.set()
            assert may_end.wait(60)
        return fetch(self, key, target, **more)

    monkeypatch.setattr(ObjectStorage, "fetch", fetch_slowly)
    slow = Thread(target=update_copy, args=(copy, NAME, old), daemon=True)
    slow.start()
    assert has_begun.wait(60)
    third = promote_new(registry, 3)
    follower = Thread(target=update_copy, args=(copy, NAME), daemon=True)
    follower.start()
    follower.join(30)
    assert not follower.is_alive()
    assert read_champion(copy, NAME) == third
    may_end.set()
    slow.join(60)
    assert not slow.is_alive()
    assert {*list_versions(copy, NAME)} == {champion, old, third}
    assert read_champion(copy, NAME) == third
    assert audit(copy, NAME).is_sound


def collect_what_is_copied(registry: Path, address: str) -> tuple[Path, Sequence[str]]:
    """A copy of all versions of a mirror, and those that its author has collected since."""
    begin_mirror(registry, address)
    copy = open_copy(address)
    update_copy(copy, NAME, EVERY_VERSION)
    for seed in (3, 4):
        promote_new(registry, seed)
    return copy, collect_garbage(registry, NAME, keep=1, by="ann").collected


def test_a_version_that_was_collected_meanwhile_is_not_asked_for(registry, address) -> None:
    """As where a server is asked for NAME@OLD, or audit begins, while the author collects it."""
    copy, (removed, *_) = collect_what_is_copied(registry, address)
    damaged = copy / NAME / "versions" / removed
    (damaged / "gate.json").write_text("damaged")
    update_copy(copy, NAME, removed)
    assert removed not in list_versions(copy, NAME)
    damaged.mkdir()  # as it is there until another process has taken the history
    update_copy(copy, NAME, removed[:12])
    assert read_copy(address) == read_champion(registry, NAME)


def test_a_registry_in_a_folder_of_that_name_is_listed(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    promote_new(tmp_path / "mirror", 1)
    assert main(["registry", "./mirror"]) == 0
    assert NAME in capfd.readouterr().out
    assert main(["registry", "mirror", "mirror"]) == 2
    assert "mirror has no name that is mirrored" in capfd.readouterr().err


def test_a_copy_fetches_again_what_it_lost_or_was_damaged_there(
    registry, address, tmp_path
) -> None:
    begin_mirror(registry, address)
    again = write_run(tmp_path / "again", 2, initial="1" * 64)  # a later verdict on the champion
    assert register(again, registry, NAME, {"parent": "p" * 64}) == read_champion(registry, NAME)
    publish(registry / NAME, address)
    champion, copy = str(read_copy(address)), open_copy(address)
    place = copy / NAME / "versions" / champion
    (place / "gate.json").write_text("damaged")
    (place / "provenance.json").unlink()
    assert read_copy(address) == champion
    (verdict,) = (copy / NAME / "judgements" / champion).iterdir()
    verdict.write_text("damaged")
    update_copy(copy, NAME, EVERY_VERSION)
    (other,) = {*list_versions(copy, NAME)} - {champion}
    weights = copy / NAME / "versions" / other / "adapters.safetensors"
    weights.write_bytes(b"x" * weights.stat().st_size)
    update_copy(copy, NAME, other)
    assert audit(copy, NAME).is_sound


def test_a_copy_that_is_being_updated_has_no_other_name(registry, address, monkeypatch) -> None:
    begin_mirror(registry, address)
    copy, fetch, seen = open_copy(address), ObjectStorage.fetch, set[str]()

    def look(self, key, target, **more):
        digest = fetch(self, key, target, **more)
        seen.update(list_names(copy))
        return digest

    monkeypatch.setattr(ObjectStorage, "fetch", look)
    read_copy(address)
    assert seen == set()
    assert list_names(copy) == [NAME]


def test_what_is_not_of_the_mirror_is_never_deleted(registry, address) -> None:
    storage = ObjectStorage(address)
    version, hexes = "a" * 64, f"{'a' * 64}/{'b' * 64}"
    own = [
        f"{NAME}/train.jsonl",
        f"{NAME}/data/train.jsonl",
        f"{NAME}/history/notes.jsonl",
        f"{NAME}/versions/{version}/gate.json",
        f"{NAME}/versions/{hexes}/rows.jsonl",
        f"{NAME}/versions/{hexes}/data/gate.json",
        f"{NAME}/judgements/{version}/notes.json",
        f"deeper/{NAME}/history/{version}.jsonl",
    ]
    spare = [
        f"{NAME}/history/{version}.jsonl",
        f"{NAME}/versions/{hexes}/gate.json",
        f"{NAME}/judgements/{hexes}.json",
    ]
    for key in own + spare:
        storage.put(key, b"of somebody")
    begin_mirror(registry, address)
    champion = str(read_champion(registry, NAME))
    key = next(key for key in objects(address) if f"versions/{champion}" in key)
    own.append(key.rpartition("/")[0] + "/notes.txt")
    storage.put(own[-1], b"of somebody")
    promote_new(registry, 3)
    assert objects(address).keys() >= {*own}
    assert not objects(address).keys() & {*spare}


def test_a_foreign_key_that_the_client_does_not_read_stops_no_mirror(
    registry, address, proxy: FaultyProxy
) -> None:
    proxy.foreign_key = f"{address.removeprefix('s3://bucket/')}/{NAME}/notes//x"
    begin_mirror(registry, address)
    version = promote_new(registry, 3)
    assert read_copy(address) == version


def test_files_of_a_version_that_are_lost_here_stay_in_the_mirror(registry, address) -> None:
    begin_mirror(registry, address)
    before = objects(address)
    (other,) = {*list_versions(registry, NAME)} - {read_champion(registry, NAME)}
    shutil.rmtree(registry / NAME / "versions" / other)
    publish(registry / NAME, address)
    assert objects(address) == before


def test_a_deletion_that_failed_is_done_by_the_next_publish(registry, address, monkeypatch) -> None:
    begin_mirror(registry, address)
    for seed in (3, 4):
        promote_new(registry, seed)

    def fail(self, keys) -> None:
        raise StorageError("away")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "delete", fail)
        removed = collect_garbage(registry, NAME, keep=1, by="ann").collected
    assert removed
    assert any(version in key for key in objects(address) for version in removed)
    check_champion(registry, NAME)  # what the hourly reconcile does
    assert not any(version in key for key in objects(address) for version in removed)
    assert len([key for key in objects(address) if "/history/" in key]) == 1


def test_nothing_is_deleted_where_another_author_was_faster(
    registry, address, monkeypatch, tmp_path
) -> None:
    """A copy of the registry publishes between this one's look at the pointer and at the rest."""
    begin_mirror(registry, address)
    copied = tmp_path / "copied" / "registry"
    shutil.copytree(registry, copied, symlinks=True)
    (copied / NAME / "mirror.json").unlink()
    newer = promote_new(copied, 3)
    listed = ObjectStorage.list_objects

    def list_late(self, prefix):
        monkeypatch.setattr(ObjectStorage, "list_objects", listed)
        publish(copied / NAME, address)
        return listed(self, prefix)

    monkeypatch.setattr(ObjectStorage, "list_objects", list_late)
    with pytest.raises(DamagedError, match="a copy of this one goes on elsewhere"):
        publish(registry / NAME, address)
    assert read_copy(address) == newer


def test_an_address_that_was_refused_is_not_followed(registry, address, tmp_path, capfd) -> None:
    begin_mirror(registry, address)
    promote_new(tmp_path / "other" / "registry", 5)
    begin_mirror(tmp_path / "other" / "registry", f"{address}-2")
    assert main(["registry", "mirror", str(registry), "--to", f"{address}-2"]) == 6
    assert "it is the mirror of another" in capfd.readouterr().err
    note = read_mirror_note(registry / NAME)
    assert note is not None
    assert note.address == address
    assert main(["registry", "mirror", str(registry), "--to", f"{address}-3"]) == 0
    note = read_mirror_note(registry / NAME)
    assert note is not None
    assert note.address == f"{address}-3"
    sixth = promote_new(registry, 6)
    assert read_copy(f"{address}-3") == sixth


@pytest.mark.parametrize("flags", [[], ["--to"]])
def test_one_damaged_note_of_a_mirror_does_not_stop_other_names(
    registry, address, capfd, flags
) -> None:
    begin_mirror(registry, address)
    shutil.copytree(registry / NAME, registry / "another", symlinks=True)
    (registry / "another" / "mirror.json").write_text("{}")
    promote_new(registry, 3)
    to = [*flags, address] if flags else []
    assert main(["registry", "mirror", str(registry), *to]) == 6
    told = capfd.readouterr()
    assert "does not say where another is mirrored" in told.err
    assert f"{NAME}: champion" in told.out


def test_removed_versions_leave_the_mirror_and_its_copies(registry, address) -> None:
    copy, removed = collect_what_is_copied(registry, address)
    assert removed
    assert not [key for key in objects(address) if any(version in key for version in removed)]
    update_copy(copy, NAME, EVERY_VERSION)
    assert list_versions(copy, NAME) == list_versions(registry, NAME)
    assert audit(copy, NAME).is_sound
    assert len([key for key in objects(address) if "/history/" in key]) == 1


def test_one_version_is_fetched_by_its_first_digits(registry, address) -> None:
    begin_mirror(registry, address)
    copy, champion = open_copy(address), read_champion(registry, NAME)
    (other,) = {*list_versions(registry, NAME)} - {champion}
    update_copy(copy, NAME)
    rollback(registry, NAME, by="ann")
    third = promote_new(registry, 3)
    update_copy(copy, NAME, other[:8])  # the champion moved, too: it is there with its files
    assert {*list_versions(copy, NAME)} == {champion, other, third}
    assert read_verified_version(copy, NAME, str(read_champion(copy, NAME))).version == third
    with pytest.raises(ConfigError, match="names no versions"):
        update_copy(copy, NAME, "abcdef012345")
    assert read_copy(address) == third


def test_the_second_registry_on_a_prefix_is_refused(registry, address, tmp_path) -> None:
    begin_mirror(registry, address)
    before = objects(address)
    promote_new(tmp_path / "other" / "registry", 5)
    with pytest.raises(DamagedError, match=r"it is the mirror of another\s+registry"):
        begin_mirror(tmp_path / "other" / "registry", address)
    assert objects(address) == before
    assert read_copy(address) == read_champion(registry, NAME)


def test_a_copy_that_goes_on_elsewhere_is_refused(registry, address, tmp_path, caplog) -> None:
    begin_mirror(registry, address)
    copied = tmp_path / "copied" / "registry"
    shutil.copytree(registry, copied, symlinks=True)
    champion = promote_new(registry, 3)
    before = objects(address)
    own = promote_new(copied, 4)  # the change is made, and its mirror is not
    assert read_champion(copied, NAME) == own
    assert "a copy of this one goes on elsewhere" in caplog.text
    assert objects(address) == before
    assert read_copy(address) == champion


def test_an_author_that_comes_between_is_seen_at_the_pointer(
    registry, address, tmp_path, monkeypatch
) -> None:
    """Another registry creates the pointer after this one has seen none: its put is refused."""
    other = tmp_path / "other" / "registry"
    promote_new(other, 5)
    put = ObjectStorage.replace
    puts = []

    def put_after_other(self, key, content, tag) -> None:
        monkeypatch.setattr(ObjectStorage, "replace", put)
        puts.append(tag)
        publish(other / NAME, address)
        put(self, key, content, tag)

    monkeypatch.setattr(ObjectStorage, "replace", put_after_other)
    with pytest.raises(DamagedError, match="Nothing was put"):
        publish(registry / NAME, address)
    assert puts == [None]
    assert read_copy(address) == read_champion(other, NAME)


def test_a_mirror_that_fell_behind_is_caught_up(
    registry, address, server, monkeypatch, caplog
) -> None:
    begin_mirror(registry, address)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    third = promote_new(registry, 3)
    assert read_champion(registry, NAME) == third
    assert "The mirror of" in caplog.text
    assert "is behind" in caplog.text
    note = read_mirror_note(registry / NAME)
    assert note is not None
    assert note.end != read_ledger(registry / NAME).end_sha256
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    assert read_copy(address) != third
    check_champion(registry, NAME)  # what the hourly reconcile does
    assert read_copy(address) == third
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    promote_new(registry, 4)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    assert read_copy(address) == third
    fifth = promote_new(registry, 5)
    assert read_copy(address) == fifth


def test_a_server_that_never_answers_is_waited_for_no_longer_than_the_limit(
    registry, address, monkeypatch, caplog
) -> None:
    begin_mirror(registry, address)
    monkeypatch.setattr(author_module, "SECONDS_AFTER_CHANGE", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        began = time.monotonic()
        third = promote_new(registry, 3)  # two changes, each of which gives its mirror two seconds
        assert time.monotonic() - began < 12
    assert read_champion(registry, NAME) == third
    assert caplog.text.count("is behind") == 2


def test_a_server_that_takes_no_more_of_an_upload_is_left_in_time(
    author, monkeypatch, tmp_path
) -> None:
    (tmp_path / "large").write_bytes(bytes(20 * 2**20))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StorageError, match="cannot be written"):
            ObjectStorage("s3://bucket/x", seconds=6).put("small", bytes(4 * 2**20))
        with pytest.raises(StorageError, match="cannot be written"):
            ObjectStorage("s3://bucket/x", seconds=6).put("large", tmp_path / "large")
        assert time.monotonic() - began < 2 * 6 + 1


def test_torn_older_and_foreign_mirrors_are_refused_and_the_old_champion_stays(
    registry, address, tmp_path
) -> None:
    begin_mirror(registry, address)
    storage, copy = ObjectStorage(address), open_copy(address)
    old_pointer, _ = storage.read(f"{NAME}/champion.json", 10**6)
    old_history = (registry / NAME / "history.jsonl").read_bytes()
    second = read_copy(address)
    third = promote_new(registry, 3)
    weights = next(k for k in objects(address) if third in k and k.endswith(".safetensors"))
    sound, _ = storage.read(weights, 10**9)

    storage.delete([weights])
    with pytest.raises(DamagedError, match="is torn"):
        update_copy(copy, NAME)
    storage.put(weights, sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(
        DamagedError,
        match=f"{weights.rpartition('/')[0]} is not what its history records: adapters.s",
    ):
        update_copy(copy, NAME)
    storage.put(weights, sound[:-1])
    with pytest.raises(DamagedError, match="bytes. Expected"):
        update_copy(copy, NAME)
    assert read_champion(copy, NAME) == second
    assert publish(registry / NAME, address, seconds=30).files == 1  # what is cut is put again
    assert read_copy(address) == third

    pointer, tag = storage.read(f"{NAME}/champion.json", 10**6)
    history_key = f"{NAME}/history/{json.loads(old_pointer)['history']}.jsonl"
    storage.put(history_key, old_history)
    storage.replace(f"{NAME}/champion.json", old_pointer, tag)
    with pytest.raises(DamagedError, match="or older\\s+than that"):
        update_copy(copy, NAME)
    promote_new(tmp_path / "other" / "registry", 5)
    storage.delete([key for key in objects(address)])
    with pytest.raises(DamagedError, match="champion.json is not there"):
        update_copy(copy, NAME)
    begin_mirror(tmp_path / "other" / "registry", address)
    with pytest.raises(DamagedError, match="is of another registry than what was read here"):
        update_copy(copy, NAME)
    assert read_champion(copy, NAME) == third
    assert read_verified_version(copy, NAME, third).version == third

    edited = json.loads(pointer) | {"history": "0" * 64}
    _, tag = storage.read(f"{NAME}/champion.json", 10**6)
    for content, problem in (
        (json.dumps(edited).encode(), "is torn"),  # its history is gone
        (b"{}", "is no pointer of a mirror"),
        (json.dumps(edited | {"layout": 2}).encode(), "of a newer nested-tune"),
    ):
        storage.replace(f"{NAME}/champion.json", content, tag)
        _, tag = storage.read(f"{NAME}/champion.json", 10**6)
        with pytest.raises(DamagedError, match=problem):
            update_copy(copy, NAME)
    assert read_champion(copy, NAME) == third


def test_an_edited_history_is_refused(registry, address) -> None:
    begin_mirror(registry, address)
    storage, second = ObjectStorage(address), read_champion(registry, NAME)
    pointer, tag = storage.read(f"{NAME}/champion.json", 10**6)
    history = (registry / NAME / "history.jsonl").read_bytes()
    lines = history.splitlines(keepends=True)
    edited = b"".join([lines[0].replace(b'"by": "', b'"by": "not '), *lines[1:]])
    cases = {
        edited: (json.loads(pointer)["champion"], "has a damaged history"),
        b"".join(lines[:2]): (second, "does not say what its history says"),
        history[:-1]: (second, "does not say what its history says"),
    }
    for content, (champion, problem) in cases.items():
        digest = sha256(content).hexdigest()
        storage.put(f"{NAME}/history/{digest}.jsonl", content)
        facts = {"history": digest, "size": len(content), "champion": champion}
        storage.replace(
            f"{NAME}/champion.json", json.dumps(json.loads(pointer) | facts).encode(), tag
        )
        _, tag = storage.read(f"{NAME}/champion.json", 10**6)
        with pytest.raises(DamagedError, match=problem):
            update_copy(open_copy(address), NAME)
    assert not (open_copy(address) / NAME).exists()


@pytest.mark.parametrize("field", ["version", "judgement", "manifest"])
def test_a_history_whose_names_are_paths_is_refused(registry, address, tmp_path, field) -> None:
    """Whoever writes to the bucket may say anything, and reaches no file of a reader by it."""
    begin_mirror(registry, address)
    storage, champion = ObjectStorage(address), read_champion(registry, NAME)
    read_copy(address)
    kept = tmp_path / "kept"
    kept.mkdir()
    history = (registry / NAME / "history.jsonl").read_bytes()
    before = history.splitlines(keepends=True)[-1]
    line = json.loads(before) | {
        "action": "judged" if field == "judgement" else "collected",
        "version": champion,
        "previous": champion,
        "previous_line_sha256": sha256(before).hexdigest(),
        field: os.path.relpath(kept, open_copy(address) / NAME / "versions"),
    }
    content = history + json.dumps(line).encode() + b"\n"
    digest = sha256(content).hexdigest()
    storage.put(f"{NAME}/history/{digest}.jsonl", content)
    pointer, tag = storage.read(f"{NAME}/champion.json", 10**6)
    facts = {"history": digest, "size": len(content), "lines": 5, "champion": champion}
    edited = json.dumps(json.loads(pointer) | facts).encode()
    storage.replace(f"{NAME}/champion.json", edited, tag)
    with pytest.raises(DamagedError, match="names what is no digest"):
        update_copy(open_copy(address), NAME, EVERY_VERSION)
    assert kept.is_dir()


def test_a_damaged_version_is_not_put(registry, address, caplog, tmp_path) -> None:
    champion = read_champion(registry, NAME)
    (other,) = {*list_versions(registry, NAME)} - {champion}
    path = registry / NAME / "versions" / other / "adapters.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1])
    begin_mirror(registry, address)
    assert "Not put into the mirror" in caplog.text
    assert read_copy(address) == champion
    path.write_bytes(sound)
    publish(registry / NAME, address)
    update_copy(open_copy(address), NAME, EVERY_VERSION)
    assert audit(open_copy(address), NAME).is_sound
    path = registry / NAME / "versions" / str(champion) / "adapters.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1])
    with pytest.raises(DamagedError, match="is not what was registered"):
        publish(registry / NAME, address)
    path.write_bytes(sound)
    path.parent.rename(tmp_path / "lost")
    with pytest.raises(DamagedError, match="is not what was registered"):
        publish(registry / NAME, f"{address}-2")
    assert objects(f"{address}-2") == {}


def answer_once(server: socket.socket, answer: bytes) -> None:
    """Take one request, whatever it is."""
    connection, _ = server.accept()
    with connection:
        connection.recv(10**6)
        connection.sendall(answer)


@with_users
def test_who_may_not_read_or_write_is_told_so(registry, address, monkeypatch, tmp_path) -> None:
    begin_mirror(registry, address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "reader-secret")
    assert read_copy(address) == read_champion(registry, NAME)
    with pytest.raises(StorageError, match="cannot be written .*403"):
        publish(registry / NAME, f"{address}-2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StorageError, match="403 Forbidden.*credentials") as error:
        read_copy(address)
    assert "wrong-secret" not in str(error.value)
    with socket.create_server(("127.0.0.1", 0)) as server:  # whose answer is no XML
        answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 15\r\n\r\nof key - AKIA12"
        Thread(target=answer_once, args=(server, answer), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(StorageError, match="code: 403 Forbidden[.] Check") as error:
            read_copy(address)
    assert "AKIA12" not in str(error.value)
    for endpoint in ("", "nonsense", "http://", "http://256.1.1.1:1"):  # some make the client panic
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StorageError, match="cannot be"):
            read_copy(address)
        promote_new(registry, 3 + len(endpoint))  # is not lost to it


def test_four_processes_promote_in_one_order_and_the_pointer_is_last(registry, address) -> None:
    begin_mirror(registry, address)
    runs = [write_run(registry.parent / f"many-{seed}", seed) for seed in range(10, 42)]
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.builders.registering import promote, register\n"
        "for run in sys.argv[2:]:\n"
        f"    version = register(Path(run), Path(sys.argv[1]), {NAME!r}, {{'parent': 'p' * 64}})\n"
        f"    promote(Path(sys.argv[1]), {NAME!r}, version, by='ann')\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, registry, *runs[start::4]])
        for start in range(4)
    ]
    assert [process.wait() for process in processes] == [0] * 4
    assert read_copy(address) == read_champion(registry, NAME)
    copy, here = (place / NAME / "history.jsonl" for place in (open_copy(address), registry))
    assert copy.read_bytes() == here.read_bytes()
    promoted = [e.version for e in read_ledger(registry / NAME).entries if e.action == "promote"]
    assert len(promoted) == len({*promoted}) == 34


def test_a_run_that_could_not_be_mirrored_is_refused_before_it_trains(
    tmp_path, capfd, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    command = ["train", "--model", str(MODEL), "--data", str(DATA), "--num-layers", "-1"]
    command += ["--run-dir", str(tmp_path / "run"), "--registry.path", str(tmp_path / "registry")]
    command += ["--registry.name", NAME, "--registry.mirror", "s3://bucket/prefix"]
    assert main(command) == 2
    assert "pip install 'nested-tune[mirror]'" in capfd.readouterr().err
    assert not (tmp_path / "registry").exists()


def test_nothing_of_it_is_loaded_without_a_mirror(tmp_path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.core.registry.conftest import write_run\n"
        "import flows.cli, nested_core.pipeline.finetune\n"
        "from tests.builders.registering import register, promote\n"
        "registry = Path(sys.argv[1]) / 'registry'\n"
        "run = write_run(Path(sys.argv[1]) / 'run', 1)\n"
        "promote(registry, 'a', register(run, registry, 'a', {'parent': 'p' * 64}), by='ann')\n"
        "print([m for m in sys.modules if 'obstore' in m or 'rooms.mirror' in m])\n"
    )
    command = [sys.executable, "-c", program, tmp_path]
    assert subprocess.check_output(command, text=True, env=dict(os.environ)) == "[]\n"
