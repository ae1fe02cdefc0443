"""A folder that is this user's alone, for what processes of one user share on a machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from nested_core.errors import ConfigError


def user_folder(what: str, otherwise: str, given: str | None = None) -> Path:
    """The folder `given`, or one below the temporary folder; it is made where it is missing.

    Raises ConfigError, which says `what` cannot be kept and what to do `otherwise`, where it is
    another user's. Below the temporary folder, where anybody may write, a link counts as that.
    """
    folder = Path(given or f"{tempfile.gettempdir()}/nested-tune-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    is_link = not given and folder.is_symlink()
    if is_link or folder.stat().st_uid != os.getuid():
        raise ConfigError(
            f"{folder} belongs to another user: {what} cannot be kept there. {otherwise}"
        )
    return folder
