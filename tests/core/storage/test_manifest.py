"""A manifest names every file of a folder, and itself: whatever is changed is found and named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nested_core import DamagedError
from nested_core.storage.manifest import (
    describe_file,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from tests.builders.file_damage import append_space, link_to_itself_elsewhere, make_pipe

FACTS = {"step": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two files and its manifest."""
    (tmp_path / "a.bin").write_bytes(b"aaaa")
    (tmp_path / "b.bin").write_bytes(b"")
    write_manifest(tmp_path, FACTS)
    return tmp_path


def refused(folder: Path, message: str) -> None:
    """Expect DamagedError with this message, whose paths are relative to the folder."""
    with pytest.raises(DamagedError) as error:
        verify_manifest(folder)
    assert str(error.value).replace(f"{folder}/", "") == message
    assert error.value.exit_code == 6


def test_a_sound_folder_gives_its_facts(folder: Path) -> None:
    assert verify_manifest(folder) == FACTS


def test_it_lists_size_and_hash_of_every_file(folder: Path) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["files"] == {
        "a.bin": {
            "bytes": 4,
            "sha256": "61be55a8e2f6b4e172338bddf184d6dbee29c98853e0a0485ecee7f27b9af0b4",
        },
        "b.bin": {
            "bytes": 0,
            "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        },
    }


def test_its_digest_depends_on_facts_and_content_alone(folder: Path) -> None:
    digest = read_manifest(folder)["digest"]
    assert write_manifest(folder, FACTS) == digest
    assert write_manifest(folder, {"step": 4}) != digest
    (folder / "a.bin").write_bytes(b"aaab")
    assert write_manifest(folder, FACTS) != digest


def changed(path: Path) -> None:
    path.write_bytes(b"aaab")


CHANGED = "a.bin has changed since it was written (size or SHA-256)."
IRREGULAR = "a.bin is not a regular file. Only regular files belong here."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed, CHANGED),
        (append_space, CHANGED),
        (Path.unlink, "a.bin is missing: MANIFEST.json lists it."),
        (link_to_itself_elsewhere, IRREGULAR),
        (make_pipe, IRREGULAR),
    ],
)
def test_a_file_that_is_not_what_it_was_is_named(folder, change, message) -> None:
    change(folder / "a.bin")
    refused(folder, message)


@pytest.mark.parametrize(
    "add",
    [
        Path.touch,
        Path.mkdir,
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path.parent),
    ],
    ids=["file", "folder", "link to nothing", "link to a folder"],
)
@pytest.mark.parametrize("name", ["extra", ".hidden"])
def test_anything_extra_is_named(folder: Path, name: str, add: Callable[[Path], None]) -> None:
    add(folder / name)
    refused(folder, f"{name} is not listed in MANIFEST.json: it does not belong.")


def test_a_folder_without_a_manifest_was_never_finished(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()
    refused(folder, "MANIFEST.json is missing: the folder was never finished.")


@pytest.mark.parametrize("key", ["facts", "files", "digest"])
def test_an_edited_manifest_is_refused(folder: Path, key: str) -> None:
    path = folder / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    edits = {"facts": {"step": 4}, "files": {}, "digest": "0" * 64}
    path.write_text(json.dumps(manifest | {key: edits[key]}))
    refused(folder, "MANIFEST.json has changed since it was written.")


@pytest.mark.parametrize(
    "change", [lambda value: value | {"note": "harmless"}, lambda value: value]
)
def test_a_manifest_written_by_other_hands_is_refused(folder, change) -> None:
    path = folder / "MANIFEST.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    refused(folder, "MANIFEST.json has changed since it was written.")


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "3", '{"facts": {}}', '{"facts": {}, "files": [1]}'),
        *('{"facts": NaN, "files": {}}', "[" * 100_000),
    ],
)
def test_what_is_no_manifest_is_refused(folder: Path, content: str) -> None:
    (folder / "MANIFEST.json").write_text(content)
    with pytest.raises(DamagedError, match=r"MANIFEST\.json cannot be read as a manifest: "):
        verify_manifest(folder)


def test_a_manifest_of_more_than_4_mib_is_not_read(folder: Path) -> None:
    (folder / "MANIFEST.json").write_bytes(b" " * (4 * 1024 * 1024 + 1))
    refused(folder, "MANIFEST.json is larger than 4194304 bytes.")


@pytest.mark.parametrize("add", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_only_regular_files_are_listed_in_the_first_place(tmp_path, add) -> None:
    add(tmp_path / "thing")
    with pytest.raises(DamagedError, match="thing is not a regular file"):
        write_manifest(tmp_path, {})


def test_a_file_of_another_size_is_not_read(folder: Path) -> None:
    os.truncate(folder / "a.bin", 50 * 2**30)  # sparse: hashing it would take minutes
    refused(folder, "a.bin has changed since it was written (size or SHA-256).")


def test_a_file_that_is_gone_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"a\.bin is missing\. Bring it back"):
        describe_file(tmp_path / "a.bin")
