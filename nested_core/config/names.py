"""Valid names of adapters in a registry, and of repositories on the Hugging Face hub.

An adapter's name is no path, and nothing that another file system would treat specially: a dot at
the end, a device of Windows.
"""

from __future__ import annotations

import re

from nested_core.errors import shorten

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
WINDOWS_DEVICE_PATTERN = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def why_invalid_adapter_name(name: str) -> str | None:
    """Return why a name is not valid for an adapter, and what is expected; None if it is valid."""
    if NAME_PATTERN.fullmatch(name) is None:
        return (
            f"{shorten(repr(name), 80)} is not a name for an adapter. Expected 1 to 64 letters, "
            "digits, '.', '_' or '-', of which the first is a letter or a digit, "
            "such as capitals-v2."
        )
    if name.endswith(".") or WINDOWS_DEVICE_PATTERN.fullmatch(name):
        return (
            f"{name!r} is not a name for an adapter: a network folder that Windows reads too drops "
            "a dot at the end, and takes con, nul, com1 and the like for devices. Use another name."
        )
    return None


HUB_NAME_PATTERN = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
