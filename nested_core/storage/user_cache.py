"""This user's cache between runs: hashes, data sets, answers, and MLX's kernels.

Each kind has a folder that nobody else may write to. An entry is a file or a folder, named by a
digest of all that it depends on; one that was not used for a month is removed.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError, DamagedError
from nested_core.storage.addresses import require_no_address
from nested_core.storage.atomic import digest_json, temporary_beside, write_json
from nested_core.storage.untrusted_files import read_json

CACHE_VARIABLE = "NESTED_TUNE_CACHE"
MAX_VALUE_BYTES = 256 * 2**20
MAX_UNUSED_SECONDS = 30 * 24 * 3600
OTHERS_WRITE_BITS = stat.S_IWGRP | stat.S_IWOTH
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return $NESTED_TUNE_CACHE, or nested-tune in $XDG_CACHE_HOME or ~/.cache.

    $XDG_CACHE_HOME counts where it is absolute, as the XDG Base Directory Specification says.
    """
    if given := given_folder(CACHE_VARIABLE):
        return given
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "nested-tune"


def given_folder(variable: str) -> Path | None:
    """Return the folder that an environment variable names, which is no address; None without."""
    given = os.environ.get(variable)
    if not given:
        return None
    require_no_address(given, lambda message: ConfigError(f"{variable}: {message}."))
    return Path(given)


@dataclass(frozen=True)
class UserCache:
    """The cache of one kind of content.

    contents: what is cached, for messages.
    danger: what somebody who may write there could do, for messages.
    variable: the environment variable that chooses the folder.
    """

    folder: Path
    contents: str
    danger: str
    variable: str = CACHE_VARIABLE

    def require_usable(self) -> None:
        """Create the folder if it is missing; ConfigError if others may write to or replace it."""
        try:
            # Missing folders above are made one by one, also for this user alone
            above = [path for path in self.folder.parents if not path.exists()]
            for folder in (*reversed(above), self.folder):
                folder.mkdir(mode=0o700, exist_ok=True)  # else parents go by the umask
        except OSError as error:
            raise ConfigError(
                f"{self.folder}, where {self.contents} are kept, cannot be made: {error}. Set "
                f"{self.variable} to a folder that you can write to."
            ) from error
        open_to_others = _folder_that_others_may_write(self.folder)
        if open_to_others is not None:
            raise ConfigError(
                f"{open_to_others}, where {self.contents} are kept, belongs to or can be written "
                f"by others, who could {self.danger}. Make it yours alone (chmod 700), or set "
                f"{self.variable} to a folder that is."
            )

    def entry(self, depends_on: object) -> Path:
        """Return the path of a cache entry, which need not exist.

        depends_on: the JSON values that the entry is determined by.

        Raises ConfigError if the folder cannot be used.
        """
        self.require_usable()
        return self.folder / digest_json(depends_on)

    def read(self, entry: Path) -> Any:
        """Return the JSON value that `keep` wrote; None without one, and for a damaged one.

        A used entry is touched, so that it is not removed as unused.
        """
        if not entry.exists():
            return None
        try:
            kept = read_json(entry, MAX_VALUE_BYTES)
            if kept["digest"] != digest_json(kept[self.contents]):
                raise DamagedError(f"{entry} is not what was written.")
            os.utime(entry)
        except (DamagedError, KeyError, TypeError, FileNotFoundError) as error:
            self.tell_damaged(error)
            return None
        return kept[self.contents]

    def tell_damaged(self, error: Exception) -> None:
        """Log that an entry is made again."""
        _log.warning("The cached %s are damaged and are made again: %s", self.contents, error)

    def keep(self, entry: Path, value: Any) -> None:
        """Write a JSON value as an entry; a failure is only logged, and it is made again."""
        self.remove_unused()
        try:
            write_json(entry, {"digest": digest_json(value), self.contents: value})
        except (OSError, DamagedError, ValueError) as error:
            what = self.contents.capitalize()
            _log.warning("%s could not be cached for later runs: %s", what, error)

    def list_unused(self) -> list[Path]:
        """Return the entries that were not used for a month; use renews their modification time."""
        oldest = time.time() - MAX_UNUSED_SECONDS
        unused = []
        for entry in self.folder.iterdir() if self.folder.is_dir() else ():
            with suppress(OSError):  # another process was faster
                if entry.lstat().st_mtime < oldest:
                    unused.append(entry)
        return unused

    def remove_unused(self) -> None:
        """Remove the entries that were not used for a month."""
        for entry in self.list_unused():
            with suppress(OSError):  # another process was faster
                remove_entry(entry)


def remove_entry(entry: Path) -> None:
    """Remove a cache entry, renaming it first so that nobody reads half of it."""
    aside = temporary_beside(entry)
    with suppress(FileNotFoundError):  # another process was faster
        entry.rename(aside)
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)


def _folder_that_others_may_write(folder: Path) -> Path | None:
    """Return the folder, or one above it, that other users may write to or replace; else None.

    A folder above it counts if it belongs to another user or is writable by others, unless it is
    sticky as /tmp is. Above the direct parent, write permission of the user's status group is
    accepted, since many systems allow it in home folders.
    """
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & OTHERS_WRITE_BITS:
        return folder
    forbidden = OTHERS_WRITE_BITS
    for above in folder.resolve().parents:
        status = above.stat()
        is_open = status.st_mode & forbidden and not status.st_mode & stat.S_ISVTX
        if is_open or status.st_uid not in (0, os.getuid()):
            return above
        forbidden = stat.S_IWOTH
    return None
