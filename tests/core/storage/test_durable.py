"""Whatever stops a write, the old content or the new stands there, whole."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from nested_core.storage.atomic import (
    canonical_json,
    new_directory,
    remove_leftovers,
    write_bytes,
    write_json,
)
from tests.core.limits import largest_file
from tests.core.registry.faults import (
    InjectedError,
    copies,
    failed_at,
    injected,
    kill_self,
    killed_at,
    raise_io_error,
)

# The children of these forks only touch files; that the parent has threads does not matter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.slow("stops a process at each system call in turn"),
]

OLD, NEW = b"old " * 1000, b"new " * 1500


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a directory."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def replace_file(folder: Path) -> None:
    write_bytes(folder / "file", NEW)


def make_directory(folder: Path) -> None:
    with new_directory(folder / "made") as temporary:
        (temporary / "a").write_bytes(NEW)
        (temporary / "b").write_bytes(NEW)


def replace_directory(folder: Path) -> None:
    with new_directory(folder / "made", replace=True) as temporary:
        (temporary / "c").write_bytes(OLD)


class TestWriteBytes:
    @pytest.mark.parametrize("stop", [killed_at, failed_at])
    def test_stopped_at_any_call_the_file_is_old_or_new(self, stop, tmp_path) -> None:
        template = tmp_path / "template"
        template.mkdir()
        (template / "file").write_bytes(OLD)
        seen = set()
        for number, folder in copies(template):
            if not stop(number, replace_file, folder):
                break
            seen.add((folder / "file").read_bytes())
            remove_leftovers(folder)
            assert names(folder) == ["file"]
        assert number > 4
        assert seen == {OLD, NEW}

    def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_end(
        self, tmp_path: Path
    ) -> None:
        with injected(0, kill_self) as calls:
            replace_file(tmp_path)
        first, replaced = calls.seen.index("fsync"), calls.seen.index("replace")
        assert first < replaced < len(calls.seen) - 1 - calls.seen[::-1].index("fsync")

    def test_an_error_leaves_no_leftovers(self, tmp_path: Path) -> None:
        (tmp_path / "file").mkdir()
        with pytest.raises(IsADirectoryError):
            replace_file(tmp_path)
        assert names(tmp_path) == ["file"]


class TestNewDirectory:
    @pytest.mark.parametrize("stop", [killed_at, failed_at])
    def test_stopped_at_any_call_it_is_whole_or_not_there(self, stop, tmp_path) -> None:
        template = tmp_path / "template"
        template.mkdir()
        seen = set()
        for number, folder in copies(template):
            if not stop(number, make_directory, folder):
                break
            remove_leftovers(folder)
            seen.add(tuple(names(folder)))
            if names(folder):
                assert contents(folder / "made") == {"a": NEW, "b": NEW}
        assert number > 8
        assert seen == {(), ("made",)}

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_an_exception_inside_leaves_the_old_directory_and_no_leftovers(
        self, error: type[BaseException], tmp_path: Path
    ) -> None:
        make_directory(tmp_path)

        def fail() -> None:
            with new_directory(tmp_path / "made", replace=True) as temporary:
                (temporary / "a").write_bytes(b"half")
                raise error

        with pytest.raises(error):
            fail()
        assert names(tmp_path) == ["made"]
        assert contents(tmp_path / "made") == {"a": NEW, "b": NEW}

    def test_killed_at_any_call_a_replacement_is_the_old_or_the_new_after_mending(
        self, tmp_path: Path
    ) -> None:
        template = tmp_path / "template"
        make_directory(template)
        old, new, seen, was_without_a_name = {"a": NEW, "b": NEW}, {"c": OLD}, [], False
        for number, folder in copies(template):
            if not killed_at(number, replace_directory, folder):
                break
            was_without_a_name |= not (folder / "made").exists()
            remove_leftovers(folder)
            assert names(folder) == ["made"]
            seen.append(contents(folder / "made"))
        assert number > 8
        assert (seen[0], seen[-1]) == (old, new)
        assert all(found in (old, new) for found in seen)
        assert was_without_a_name  # between its two renames

    def test_an_error_between_the_two_renames_brings_the_old_directory_back_at_once(
        self, tmp_path: Path
    ) -> None:
        make_directory(tmp_path / "dry-run")
        with injected(0, kill_self) as dry:
            replace_directory(tmp_path / "dry-run")
        second = [i for i, call in enumerate(dry.seen, start=1) if call == "rename"][1]
        folder = tmp_path / "run"
        make_directory(folder)
        with injected(second, raise_io_error), pytest.raises(InjectedError):
            replace_directory(folder)
        assert names(folder) == ["made"]
        assert contents(folder / "made") == {"a": NEW, "b": NEW}

    def test_what_was_retired_comes_back_when_the_next_one_is_written(self, tmp_path: Path) -> None:
        make_directory(tmp_path)
        (tmp_path / "made").rename(tmp_path / ".old-made")
        with pytest.raises(OSError, match="exists already"):
            make_directory(tmp_path)
        assert names(tmp_path) == ["made"]
        assert contents(tmp_path / "made") == {"a": NEW, "b": NEW}

    def test_every_file_and_folder_is_synced_before_the_rename(self, tmp_path: Path) -> None:
        with injected(0, kill_self) as calls, new_directory(tmp_path / "made") as temporary:
            (temporary / "folder").mkdir()
            (temporary / "folder" / "a").write_bytes(NEW)
            (temporary / "b").write_bytes(NEW)
        until_rename = list(itertools.takewhile(lambda call: call != "rename", calls.seen))
        assert until_rename.count("fsync") == 4  # two files, the folder, the directory itself
        assert calls.seen[len(until_rename) :].count("fsync") == 1  # the parent

    def test_readers_never_see_the_temporary_name(self, tmp_path: Path) -> None:
        with new_directory(tmp_path / "made") as temporary:
            assert temporary.parent == tmp_path
            assert temporary.name.startswith(".tmp-made-")
            assert not (tmp_path / "made").exists()


def test_leftovers_are_removed_and_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-1-0a").mkdir()
    (tmp_path / ".tmp-step-1-0a" / "half").write_bytes(OLD)
    (tmp_path / ".tmp-state.json-0b").write_bytes(OLD)
    (tmp_path / ".hidden").write_bytes(OLD)
    make_directory(tmp_path)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "made"]


def test_json_is_readable_and_ends_with_a_line_break(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 1,\n  "a": "é"\n}\n'


@pytest.mark.parametrize("value", [math.nan, math.inf, object()])
def test_json_of_what_json_has_no_word_for_keeps_the_old_file(value: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", {"a": value})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    value = {"b": [1, 2.5], "a": {"d": None, "c": "é"}}
    expected = rb'{"a":{"c":"\u00e9","d":null},"b":[1,2.5]}'
    assert canonical_json(value) == canonical_json(dict(reversed(value.items()))) == expected


def test_a_write_that_fails_names_the_target_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", OLD)
    with largest_file(len(OLD)), pytest.raises(OSError, match="File too large") as caught:
        replace_file(tmp_path)
    assert caught.value.filename == str(tmp_path / "file")
    assert contents(tmp_path) == {"file": OLD}


def test_a_name_as_long_as_the_system_takes_can_be_written(tmp_path: Path) -> None:
    for name in ("a" * 255, "é" * 127):
        write_bytes(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"


@pytest.mark.parametrize("name", ["a" * 256, "folder/absent/x"])
def test_an_error_names_the_target_and_never_a_temporary_file(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    for write in (lambda: write_bytes(target, b"x"), lambda: _write_folder(target / "y")):
        (tmp_path / "folder").touch()
        with pytest.raises(OSError, match="File name too long|Not a directory") as caught:
            write()
        assert str(caught.value.filename).startswith(str(target))
        assert ".tmp-" not in str(caught.value)


def _write_folder(target: Path) -> None:
    with new_directory(target):
        pass
