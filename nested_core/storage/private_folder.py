"""Folders of results that are kept between runs, and that nobody else may write to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nested_core.errors import ConfigError
from nested_core.storage.compiled_kernels import CACHE_VARIABLE


def make_folder_only_user_may_write(folder: Path, contents: str, danger: str) -> None:
    """Make the folder if it is missing, and refuse one that others own or may write to.

    `contents` says what is kept there, and `danger` what who may write there could do. Raises
    ConfigError.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}, where {contents} are kept, cannot be made: {error}. Set "
            f"{CACHE_VARIABLE} to a folder that you can write to."
        ) from error
    if not _only_user_may_write(folder):
        raise ConfigError(
            f"{folder}, where {contents} are kept, belongs to or can be written by others, "
            f"who could {danger}. Make it yours alone (chmod 700), or set "
            f"{CACHE_VARIABLE} to a folder that is."
        )


def _only_user_may_write(folder: Path) -> bool:
    """Whether a folder is this user's own, and nobody else may write in it; OSError if missing."""
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
