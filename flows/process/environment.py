"""Where the examples and deployments that came with it are."""

from __future__ import annotations

from pathlib import Path

FLOWS_FOLDER = Path(__file__).parents[1]

LOG_FORMAT_VARIABLE = "NESTED_TUNE_LOG_FORMAT"  # of logs: one of json_log.FORMATS


def packaged_folder(name: str) -> Path:
    """The folder of data of this name, "examples" or "deployments": in a wheel or the checkout."""
    installed = FLOWS_FOLDER / "_shipped" / name
    return installed if installed.is_dir() else FLOWS_FOLDER.parent / name
