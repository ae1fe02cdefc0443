"""What is kept between runs for this user: hashes, data sets, answers, and MLX's kernels.

Each kind has a folder that nobody else may write to. An entry is a file or a folder, named by a
digest of all that it depends on; one that nobody used for a month is removed.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError
from nested_core.storage.atomic import canonical_json, temporary_beside

CACHE_VARIABLE = "NESTED_TUNE_CACHE"
MAX_UNUSED_SECONDS = 30 * 24 * 3600
OTHERS_WRITE_BITS = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """$NESTED_TUNE_CACHE, else nested-tune in $XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nested-tune"


@dataclass(frozen=True)
class UserCache:
    """The entries of one kind.

    contents: what is kept. danger: what who may write there could do. variable: chooses the folder.
    """

    folder: Path
    contents: str
    danger: str
    variable: str = CACHE_VARIABLE

    def require_usable(self) -> None:
        """Make the folder if it is missing; ConfigError if others may write or replace it."""
        try:
            above = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            for missing in reversed(above):
                missing.mkdir(mode=0o700, exist_ok=True)  # else parents go by the umask
            self.folder.mkdir(mode=0o700, exist_ok=True)
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

    def entry(self, depends_on: Any) -> Path:
        """The place of an entry, in a folder that can be used; `depends_on` is plain JSON values.

        Raises ConfigError.
        """
        self.require_usable()
        return self.folder / sha256(canonical_json(depends_on)).hexdigest()

    def list_unused(self) -> list[Path]:
        """The entries whose time of change, which their use renews, is long ago."""
        oldest = time.time() - MAX_UNUSED_SECONDS
        unused = []
        for entry in self.folder.iterdir() if self.folder.is_dir() else ():
            with suppress(OSError):  # another process was faster
                if entry.lstat().st_mtime < oldest:
                    unused.append(entry)
        return unused

    def remove_unused(self) -> None:
        """Remove those."""
        for entry in self.list_unused():
            with suppress(OSError):  # another process was faster
                remove_entry(entry)


def remove_entry(entry: Path) -> None:
    """Rename before removing: nobody finds half an entry in its place."""
    aside = temporary_beside(entry)
    with suppress(FileNotFoundError):  # another process was faster
        entry.rename(aside)
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)


def _folder_that_others_may_write(folder: Path) -> Path | None:
    """The folder, if it is not this user's own or others may write in it, or one above it.

    Who owns the folder above, or may write in one above, may put another one in its place, but for
    a sticky one, as /tmp is. Far above, a user's own group is let pass: many systems let it write
    in home folders.
    """
    own = folder.stat()
    if own.st_uid != os.getuid() or own.st_mode & OTHERS_WRITE_BITS:
        return folder
    resolved = folder.resolve()
    if resolved.parent.stat().st_uid not in (0, os.getuid()):
        return resolved.parent
    forbidden = OTHERS_WRITE_BITS
    for above in resolved.parents:
        mode = above.stat().st_mode
        if mode & forbidden and not mode & stat.S_ISVTX:
            return above
        forbidden = stat.S_IWOTH
    return None
