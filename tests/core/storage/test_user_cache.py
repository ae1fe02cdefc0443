"""What is kept between runs: where, for this user alone, and for a month after its last use."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from nested_core.data.dataset_loading import dataset_cache
from nested_core.errors import ConfigError
from nested_core.measure.answers.answer_cache import answer_cache
from nested_core.storage.user_cache import MAX_UNUSED_SECONDS, UserCache, cache_folder


def make(folder: Path) -> None:
    UserCache(folder, "answers", "change them").require_usable()


@pytest.mark.parametrize(
    ("open_folder", "mode"),
    [("own", 0o770), ("own", 0o702), ("above", 0o775), ("above", 0o707), ("far", 0o777)],
)
def test_a_folder_that_others_may_write_or_replace_is_refused(tmp_path, open_folder, mode) -> None:
    folders = {"far": tmp_path / "far"}
    folders["above"] = folders["far"] / "above"
    folders["own"] = folders["above"] / "own"
    make(folders["own"])
    folders[open_folder].chmod(mode)
    with pytest.raises(ConfigError, match=f"/{open_folder}, where answers are kept, .* by others"):
        make(folders["own"])


@pytest.mark.skipif(os.getuid() != 0, reason="root alone gives folders away")
@pytest.mark.parametrize(("owned", "mode"), [("above", 0o755), ("far", 0o755), ("far", 0o1777)])
def test_a_folder_above_that_is_another_users_is_refused(tmp_path, owned, mode) -> None:
    folder = tmp_path / "far" / "above" / "own"
    make(folder)
    place = folder.parent if owned == "above" else folder.parent.parent
    os.chown(place, 12345, -1)
    place.chmod(mode)
    with pytest.raises(ConfigError, match=f"/{owned}, where answers are kept"):
        make(folder)


@pytest.mark.parametrize(("above", "mode"), [("above", 0o1777), ("far", 0o775)])
def test_sticky_folders_and_a_group_far_above_are_let_pass(tmp_path, above, mode) -> None:
    folder = tmp_path / "far" / "above" / "own"
    make(folder)
    (folder.parent if above == "above" else folder.parent.parent).chmod(mode)
    make(folder)


def test_folders_above_are_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        make(tmp_path / "above" / "own")
    finally:
        os.umask(before)
    assert (tmp_path / "above").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made.*Set NESTED_TUNE_CACHE"):
        make(tmp_path / "file" / "cache")


def test_another_input_is_another_entry_and_what_nobody_used_for_a_month_is_removed(
    tmp_path: Path,
) -> None:
    cache = UserCache(tmp_path / "own", "answers", "change them")
    entries = [cache.entry({"asked": number}) for number in range(3)]
    assert entries[0] == cache.entry({"asked": 0})
    assert len(set(entries)) == 3
    entries[0].mkdir()
    (entries[0] / "part").touch()
    for entry in entries[1:]:
        entry.touch()
    long_ago = time.time() - MAX_UNUSED_SECONDS - 60
    for entry in entries[:2]:
        os.utime(entry, (long_ago, long_ago))
    cache.remove_unused()
    assert list(cache.folder.iterdir()) == entries[2:]


def test_where_the_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTED_TUNE_CACHE", "/given")
    assert cache_folder() == Path("/given")
    assert dataset_cache().folder == Path("/given/datasets")
    assert answer_cache().folder == Path("/given/answers")
    monkeypatch.delenv("NESTED_TUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/nested-tune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "nested-tune"


def test_an_address_is_no_folder_and_a_relative_one_of_xdg_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NESTED_TUNE_CACHE", "s3://bucket/cache")
    with pytest.raises(ConfigError, match="NESTED_TUNE_CACHE: s3://bucket/cache is an address"):
        cache_folder()
    monkeypatch.setenv("NESTED_TUNE_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("s3://bucket/cache", "cache", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache_folder() == tmp_path / ".cache" / "nested-tune"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/var/cache/nested-tune")
