"""What stands at a path. An I/O error is raised, never taken for absence, unlike os.path.exists."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Literal

Kind = Literal["missing", "file", "directory", "link", "other"]

ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


def kind_of(path: Path, *, follow_links: bool = False) -> Kind:
    """The kind of what stands at `path`; a name that cannot be is missing."""
    try:
        mode = os.stat(path, follow_symlinks=follow_links).st_mode
    except ValueError:  # a NUL in the name
        return "missing"
    except OSError as error:
        if error.errno in ABSENT:
            return "missing"
        raise
    if stat.S_ISLNK(mode):
        return "link"
    if stat.S_ISDIR(mode):
        return "directory"
    return "file" if stat.S_ISREG(mode) else "other"
