"""Addresses, SCHEME://, are refused where a path of this machine is expected.

Those of object storage are taken by the few keys and commands that the room mirror reads for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

ADDRESS_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,60}://")
BUCKET_PATTERN = re.compile(r"(s3|gs|az)://[\w.-]+(/[\w.=+-]+)*/?", re.ASCII)


def is_address(text: str) -> bool:
    """Return whether a text begins as an address, SCHEME://, does."""
    return ADDRESS_PATTERN.match(text) is not None


def is_in_bucket(text: str) -> bool:
    """Return whether a text begins as an address of object storage does."""
    return text.startswith(("s3://", "gs://", "az://"))


def require_bucket(text: str, error: Callable[[str], Exception]) -> None:
    """Raise the error for anything but an address of object storage, such as s3://bucket/prefix.

    An address has no user, no key and no query: credentials are the environment's.

    error: makes the error of a message.
    """
    if BUCKET_PATTERN.fullmatch(text) is None:
        shown = text if "@" not in text and "?" not in text else text.partition("://")[0] + "://..."
        raise error(
            f"{shown} is no address of object storage. Expected s3://BUCKET/PREFIX of letters, "
            f"digits and . _ = + -, without credentials: these are the environment's"
        )


def require_no_address(text: str, error: Callable[[str], Exception]) -> None:
    """Raise the error for SCHEME://..., which would be a folder `SCHEME:` where a path is expected.

    error: makes the error of a message.
    """
    if is_address(text):
        raise error(
            f"{text} is an address, where nothing is read or written: expected a path of this "
            f"machine. Fetch it first, such as by `curl -LO {shlex.quote(text)}` or by a client of "
            f"the storage, or mount the storage, and give that path"
        )
