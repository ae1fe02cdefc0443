"""Any change to any file of a version is found by promote, by rollback and by audit."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nested_core.errors import DamagedError, GateRejected
from nested_core.registry import read_champion, rollback
from nested_core.registry.ledger import read_ledger
from nested_core.seams import is_there
from nested_core.storage.manifest import write_manifest
from nested_core.text.foreign_text import escape_but_keep_newlines
from tests.builders.file_damage import (
    append_space,
    delete,
    empty,
    flip_a_bit,
    link_to_a_device,
    link_to_itself_elsewhere,
    make_directory,
    make_pipe,
    truncate,
    zero,
)
from tests.builders.registering import promote, register
from tests.left_out import slow_except
from tests.registry_care import audit

NAME = "capitals"
FILES = [
    *("adapters.safetensors", "adapter_config.json", "gate.json", "provenance.json"),
    *("MANIFEST.json", *(["README.md"] if is_there("export") else [])),
]


def give_a_second_name(path: Path) -> None:
    os.link(path, path.parents[4] / "second-name")


MUTATIONS = [
    *(flip_a_bit, truncate, append_space, empty, zero, delete, link_to_itself_elsewhere),
    *(make_directory, make_pipe, give_a_second_name, link_to_a_device),
]


def assert_detected(registry: Path, version: str, path: Path) -> None:
    """All three refuse; champion and history stay; the message names the file."""
    champion = read_champion(registry, NAME)
    ledger = (registry / NAME / "history.jsonl").read_bytes()
    for call in (
        lambda: promote(registry, NAME, version, by="ann"),
        lambda: rollback(registry, NAME, to=version, by="ann"),
    ):
        with pytest.raises(DamagedError) as caught:
            call()
        assert escape_but_keep_newlines(str(path)) in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 14
    assert path in [finding.file for finding in audit(registry, NAME).findings]
    assert read_champion(registry, NAME) == champion
    assert (registry / NAME / "history.jsonl").read_bytes() == ledger


def edit(path: Path, change: Callable[[dict], None]) -> None:
    path.chmod(0o644)
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "which",
    slow_except(
        ["never promoted", "champion", "former champion"],
        "champion",
        reason="each damage of each file once more",
    ),
)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mutate", MUTATIONS)
def test_mutated_file_is_found(three, registry, mutate, name, which):
    version = dict(zip(["former champion", "champion", "never promoted"], three, strict=True))[
        which
    ]
    path = registry / NAME / "versions" / version / name
    mutate(path)
    assert_detected(registry, version, path)


@pytest.mark.parametrize("name", ["extra.bin", ".hidden", "model.pt", "bad\udcff"])
def test_added_file_is_found(three, registry, name):
    path = registry / NAME / "versions" / three[2] / name
    path.write_bytes(b"")
    assert_detected(registry, three[2], path)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/etc")])
def test_added_folder_is_found(three, registry, make):
    path = registry / NAME / "versions" / three[2] / "sub"
    make(path)
    assert_detected(registry, three[2], path)


def test_every_changed_file_is_named_at_once(three, registry):
    folder = registry / NAME / "versions" / three[2]
    for name in FILES[:4]:
        append_space(folder / name)
    with pytest.raises(DamagedError) as caught:
        promote(registry, NAME, three[2], by="ann")
    assert all(name in str(caught.value) for name in FILES[:4])
    assert len(audit(registry, NAME).findings) == 4


def test_version_replaced_by_another_whole_version_is_found(three, registry):
    versions = registry / NAME / "versions"
    shutil.rmtree(versions / three[2])
    shutil.copytree(versions / three[0], versions / three[2])
    assert_detected(registry, three[2], versions / three[2] / "MANIFEST.json")


def test_version_replaced_by_a_link_to_a_sound_copy_is_found(three, registry, tmp_path):
    folder = registry / NAME / "versions" / three[2]
    folder.rename(tmp_path / "copy")
    folder.symlink_to(tmp_path / "copy")
    assert_detected(registry, three[2], folder)


def test_rewritten_manifest_of_a_former_champion_is_found_through_the_history(three, registry):
    folder = registry / NAME / "versions" / three[0]
    edit(folder / "provenance.json", lambda value: value.update(seed=99))
    (folder / "MANIFEST.json").unlink()
    write_manifest(folder, {"kind": "adapter version", "version": three[0]})
    assert_detected(registry, three[0], folder / "MANIFEST.json")


def test_rewritten_manifest_over_other_tensors_is_found_through_the_history(three, registry):
    folder, other = (registry / NAME / "versions" / three[i] for i in (2, 0))
    for name in ("adapters.safetensors", "MANIFEST.json"):
        (folder / name).unlink()
    shutil.copy(other / "adapters.safetensors", folder)
    write_manifest(folder, {"kind": "adapter version", "version": three[2]})
    assert_detected(registry, three[2], folder / "MANIFEST.json")


def test_a_verdict_rewritten_with_its_manifest_is_found_through_the_history(three, registry):
    folder = registry / NAME / "versions" / three[2]
    reason = {"code": "unchanged", "message": "Nothing moved."}
    edit(folder / "gate.json", lambda value: value.update(verdict="failed", reasons=[reason]))
    (folder / "MANIFEST.json").unlink()
    write_manifest(folder, {"kind": "adapter version", "version": three[2]})
    assert_detected(registry, three[2], folder / "MANIFEST.json")


@pytest.mark.parametrize("verdict", ["passed", "failed", "on other tensors"])
def test_a_version_that_no_line_knows_is_read_before_the_next_writer_adds_its_line(
    three, registry, verdict
):
    """As a registration leaves it that is cut short before its line."""
    folder = registry / NAME / "versions" / three[2]
    (registry / NAME / "versions" / three[0]).rename(registry / "gone")
    for name in ("history.jsonl", "champion", "champion.json"):
        (registry / NAME / name).unlink()
    reason = {"code": "unchanged", "message": "Nothing moved."}
    if verdict == "failed":
        edit(folder / "gate.json", lambda value: value.update(verdict="failed", reasons=[reason]))
    elif verdict == "on other tensors":
        (folder / "adapters.safetensors").unlink()
        shutil.copy(registry / "gone" / "adapters.safetensors", folder)
    (folder / "MANIFEST.json").unlink()
    write_manifest(folder, {"kind": "adapter version", "version": three[2]})
    if verdict == "passed":
        assert promote(registry, NAME, three[2], by="ann").outcome == "promoted"
        assert audit(registry, NAME).is_sound
        return
    with pytest.raises(GateRejected if verdict == "failed" else DamagedError):
        promote(registry, NAME, three[2], by="ann")
    assert [line.version for line in read_ledger(registry / NAME).entries] == [three[1]]


@pytest.mark.slow("500 registries")
def test_500_random_mutations_are_all_found(three, registry):
    folder, choose = registry / NAME / "versions" / three[2], random.Random(7)  # noqa: S311
    for _ in range(500):
        path = folder / choose.choice(FILES)
        sound = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(_mutated(sound, choose))
        with pytest.raises(DamagedError, match="is not what was registered"):
            promote(registry, NAME, three[2], by="ann")
        path.write_bytes(sound)
    assert promote(registry, NAME, three[2], by="ann").outcome == "promoted"


def _mutated(content: bytes, choose: random.Random) -> bytes:
    at, kind = choose.randrange(len(content)), choose.randrange(4)
    if kind == 0:
        return content[:at] + bytes([content[at] ^ (1 << choose.randrange(8))]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + choose.choice([b" ", b"\n", b"\0", b"}"]) + content[at:]
    return content + content[at:]


def test_registering_under_two_names_keeps_them_apart(three, make_run, registry, tmp_path):
    version = register(tmp_path / "run-3", registry, "rivers", {})
    (registry / NAME / "versions" / version / "gate.json").unlink()
    assert promote(registry, "rivers", version, by="ann").outcome == "promoted"
    assert audit(registry, "rivers").is_sound
    assert not audit(registry, NAME).is_sound
