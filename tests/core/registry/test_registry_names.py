"""Names that are paths, clash or lead out of the registry are refused before anything is read."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from pathlib import Path

import pytest

from nested_core.config.loading import parse_config
from nested_core.errors import ConfigError, DamagedError
from nested_core.pipeline.named_adapters import find_named_adapter
from nested_core.registry import history, list_versions, read_champion, rollback
from tests.builders.registering import promote, register
from tests.registry_care import audit

BAD_NAMES = [
    "",
    ".",
    "..",
    "../capitals",
    "/etc",
    "a/b",
    "a\\b",
    ".hidden",
    "-flag",
    "a\0b",
    "a\n",
    "capitals\n",
    "a b",
    "ümlaut",
    "٣",
    "x" * 65,
    "x" * 300,
    "a.",
    "a ",
    "a...",
    "con",
    "NUL",
    "Com1",
    "lpt9.old",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_that_is_no_name_is_refused_everywhere(make_run, registry, name):
    calls = [
        lambda: register(make_run(), registry, name, {}),
        lambda: promote(registry, name, "a" * 64, by="ann"),
        lambda: rollback(registry, name, by="ann"),
        lambda: read_champion(registry, name),
        lambda: history(registry, name),
        lambda: list_versions(registry, name),
        lambda: audit(registry, name),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="is not a name for an adapter"):
            call()
    assert not registry.exists()
    with pytest.raises(ConfigError, match=r"registry"):
        parse_config({"registry": {"path": str(registry), "name": name}}, source="a test")


@pytest.mark.parametrize(
    "name", ["a", "0", "A.b_c-9", "x" * 64, "v1..2", "console", "com", "nul-1"]
)
def test_names_within_the_rule_are_accepted(make_run, registry, name):
    assert register(make_run(), registry, name, {}) in list_versions(registry, name)


def test_name_that_differs_only_in_case_is_refused(make_run, registry):
    register(make_run(), registry, "Capitals", {})
    with pytest.raises(ConfigError, match="differs from 'capitals' only in case"):
        register(make_run(2), registry, "capitals", {})
    with pytest.raises(ConfigError, match="only in case"):
        read_champion(registry, "CAPITALS")


def test_unknown_registry_says_where_and_what_to_do(registry):
    with pytest.raises(ConfigError, match=r"no registry at .*registry\. Expected a directory"):
        read_champion(registry, "capitals")


def test_unknown_name_lists_the_names_there_are(add, registry):
    add(1)
    with pytest.raises(ConfigError, match="no adapter named 'rivers'. It holds: capitals"):
        promote(registry, "rivers", "a" * 64, by="ann")


@pytest.mark.parametrize("part", ["x" * 300, "nul\0byte", "file"])
def test_registry_path_that_cannot_be_is_refused(make_run, registry, part):
    registry.mkdir()
    (registry / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made a directory"):
        register(make_run(), registry / part, "capitals", {})


@pytest.mark.parametrize("place", ["capitals", "capitals/versions"])
def test_folder_that_is_a_link_out_of_the_registry_is_refused(make_run, registry, tmp_path, place):
    outside = tmp_path / "outside"
    register(make_run(1), outside, "capitals", {})
    link = registry / place
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / place)
    for call in (
        lambda: register(make_run(2), registry, "capitals", {}),
        lambda: read_champion(registry, "capitals"),
        lambda: audit(registry, "capitals"),
    ):
        with pytest.raises(DamagedError, match="is a symbolic link"):
            call()
    assert len(list_versions(outside, "capitals")) == 1


@pytest.mark.parametrize("given", ["link", "link@{version:.6}", "{registry}/link@{version}"])
def test_name_that_is_a_link_in_the_registry_is_refused_with_a_version_too(three, registry, given):
    (registry / "link").symlink_to("capitals")
    version = list_versions(registry, "capitals")[0]
    with pytest.raises(DamagedError, match="link is a symbolic link to 'capitals'"):
        find_named_adapter(Path(given.format(version=version, registry=registry)), registry)


@pytest.mark.parametrize("name", [".lock", "history.jsonl"])
def test_file_that_is_a_link_out_of_the_registry_is_refused(three, registry, tmp_path, name):
    path = registry / "capitals" / name
    outside = tmp_path / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)
    before = outside.read_bytes()
    with pytest.raises(DamagedError, match="symbolic link"):
        promote(registry, "capitals", three[2], by="ann")
    with pytest.raises(DamagedError, match="symbolic link"):
        history(registry, "capitals")
    assert outside.read_bytes() == before


@pytest.mark.parametrize("name", [".lock", "history.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_file_that_is_a_pipe_or_a_directory_is_refused_and_not_waited_for(
    three, registry, name, make
):
    path = registry / "capitals" / name
    path.unlink()
    make(path)
    with pytest.raises(DamagedError, match=re.escape(name)):
        promote(registry, "capitals", three[2], by="ann")
    assert read_champion(registry, "capitals") == three[1]


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json", "gate.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_file_of_a_run_that_is_no_regular_file_is_not_registered(make_run, registry, name, make):
    run = make_run()
    path = run / ("" if name == "gate.json" else "adapter") / name
    path.unlink()
    make(path)
    with pytest.raises(DamagedError, match=re.escape(name)):
        register(run, registry, "capitals", {})
    assert not registry.exists()


def test_file_of_a_run_that_leads_out_of_it_is_not_registered(make_run, registry, tmp_path):
    path = make_run() / "adapter" / "adapter_config.json"
    path.rename(tmp_path / "outside.json")
    path.symlink_to(tmp_path / "outside.json")
    with pytest.raises(DamagedError, match="is not a regular file"):
        register(path.parents[1], registry, "capitals", {})


def test_version_folder_in_capitals_is_no_version(three, registry):
    folder = registry / "capitals" / "versions"
    (folder / three[2]).rename(folder / three[2].upper())
    assert list_versions(registry, "capitals") == sorted(three[:2])
    assert {f.message for f in audit(registry, "capitals").findings} == {
        *("is not a version", "was registered, its folder is gone")
    }


@pytest.mark.parametrize(
    "version",
    ["", "abc", "../versions", "/", "zzzzzz", "A" * 64, "a" * 65, "a" * 300, "a\0"]
    + ["abcdef.", "abcdef ", "abcdef/..", "abcdef/", "nul", "٣" * 6, "abcdef\n"],
)
def test_version_that_is_no_digest_is_refused(three, registry, version):
    with pytest.raises(ConfigError, match="is not a version"):
        rollback(registry, "capitals", to=version, by="ann")
    with pytest.raises(ConfigError, match="is not a version"):
        promote(registry, "capitals", version, by="ann")


@pytest.mark.parametrize(
    ("module", "call", "code", "message"),
    [
        (os, "open", errno.EROFS, "cannot be written"),
        (os, "open", errno.EACCES, "cannot be written"),
        (fcntl, "flock", errno.ENOLCK, "cannot be locked"),
    ],
)
def test_folder_that_cannot_be_written_or_locked_is_a_configuration_error(
    three, registry, monkeypatch, module, call, code, message
):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, call, refuse)
    with pytest.raises(ConfigError, match=message):
        promote(registry, "capitals", three[2], by="ann")


def test_history_of_a_read_only_copy_can_be_read(three, registry):
    (registry / "capitals" / ".lock").unlink()
    assert len(history(registry, "capitals")) == 2
    assert audit(registry, "capitals").is_sound
