"""Who runs this program, and where the examples and deployments that came with it are."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

FLOWS_FOLDER = Path(__file__).parents[1]


def current_user() -> str:
    """The login name, or `uid N` where the system knows none, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such entry in passwd: KeyError until Python 3.12
        return f"uid {os.getuid()}"


def packaged_folder(name: str) -> Path:
    """The folder of data of this name, "examples" or "deployments": in a wheel or the checkout."""
    installed = FLOWS_FOLDER / "_shipped" / name
    return installed if installed.is_dir() else FLOWS_FOLDER.parent / name
