"""Where the examples and deployments are: beside this package in a wheel, else in the checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def packaged_folder(name: str) -> Path:
    """The folder of data of this name, "examples" or "deployments"."""
    installed = PACKAGE / "_shipped" / name
    return installed if installed.is_dir() else PACKAGE.parent / name
