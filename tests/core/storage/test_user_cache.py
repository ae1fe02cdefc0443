"""Folders for caches are refused where others may write in them or replace them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nested_core.errors import ConfigError
from nested_core.storage.user_cache import UserCache


def make(folder: Path) -> None:
    UserCache(folder, "answers", "change them").require_usable()


@pytest.mark.parametrize(
    ("open_folder", "mode"),
    [("own", 0o770), ("own", 0o702), ("above", 0o775), ("above", 0o707), ("far", 0o777)],
)
def test_a_folder_that_others_may_write_or_replace_is_refused(
    tmp_path: Path, open_folder: str, mode: int
) -> None:
    folders = {"far": tmp_path / "far"}
    folders["above"] = folders["far"] / "above"
    folders["own"] = folders["above"] / "own"
    make(folders["own"])
    folders[open_folder].chmod(mode)
    with pytest.raises(ConfigError, match=f"/{open_folder}, where answers are kept, .* by others"):
        make(folders["own"])


@pytest.mark.parametrize(("above", "mode"), [("above", 0o1777), ("far", 0o775)])
def test_sticky_folders_and_a_group_far_above_are_let_pass(
    tmp_path: Path, above: str, mode: int
) -> None:
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
