"""Where the examples and deployments are: beside this package in a wheel, else in the checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE_FOLDER = Path(__file__).parent


def packaged_folder(name: str) -> Path:
    """The folder of data of this name, "examples" or "deployments"."""
    installed = PACKAGE_FOLDER / "_shipped" / name
    return installed if installed.is_dir() else PACKAGE_FOLDER.parent / name
