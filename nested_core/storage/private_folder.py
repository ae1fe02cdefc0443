"""Folders of results that are kept between runs, and that nobody else may write to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nested_core.errors import ConfigError
from nested_core.storage.compiled_kernels import CACHE_VARIABLE


def make_folder_only_user_may_write(folder: Path, contents: str, danger: str) -> None:
    """Make the folder if it is missing, and refuse one that others own, may write to or replace.

    `contents` says what is kept there, and `danger` what who may write there could do. Raises
    ConfigError.
    """
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)  # without `mode`, parents go by the umask
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}, where {contents} are kept, cannot be made: {error}. Set "
            f"{CACHE_VARIABLE} to a folder that you can write to."
        ) from error
    open_to_others = _folder_that_others_may_write(folder)
    if open_to_others is not None:
        raise ConfigError(
            f"{open_to_others}, where {contents} are kept, belongs to or can be written by others, "
            f"who could {danger}. Make it yours alone (chmod 700), or set "
            f"{CACHE_VARIABLE} to a folder that is."
        )


def _folder_that_others_may_write(folder: Path) -> Path | None:
    """The folder, if it is not this user's own or others may write in it, or one above it.

    Who may write in a folder above may put another one in its place, but for a sticky one, as /tmp
    is. Far above, a user's own group is let pass: many systems let it write in home folders.
    """
    own = folder.stat()
    if own.st_uid != os.getuid() or own.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return folder
    forbidden = stat.S_IWGRP | stat.S_IWOTH
    for above in folder.resolve().parents:
        mode = above.stat().st_mode
        if mode & forbidden and not mode & stat.S_ISVTX:
            return above
        forbidden = stat.S_IWOTH
    return None
