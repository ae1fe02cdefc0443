"""Addresses, SCHEME://, where a path of this machine is expected, are refused."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

ADDRESS_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,60}://")


def require_no_address(text: str, error: Callable[[str], Exception]) -> None:
    """Raise the error for SCHEME://..., which would be a folder `SCHEME:` where a path is expected.

    error: makes the error of a message.
    """
    if ADDRESS_PATTERN.match(text):
        raise error(
            f"{text} is an address, where nothing is read or written: expected a path of this "
            f"machine. Fetch it first, such as by `curl -LO {shlex.quote(text)}` or by a client of "
            f"the storage, or mount the storage, and give that path"
        )
