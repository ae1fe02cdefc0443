"""Addresses, SCHEME://, are refused where a path of this machine is expected.

Those of object storage are taken by the few keys and commands that the room mirror reads for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

ADDRESS_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,60}://")
BUCKET_PATTERN = re.compile(
    r"(s3|gs|az)://(?!(.*/)?[.][.]?(/|$))[\w.-]+(/[\w.=+-]+)*/?",  # no part is . or ..
    re.ASCII,
)


BUCKET_ADVICE = ". chat, evaluate, history, audit and serve read a registry there by --registry"


def is_in_bucket(text: str) -> bool:
    """Return whether a text begins as an address of object storage does."""
    return text.startswith(("s3://", "gs://", "az://"))


def _hide_credentials(text: str) -> str:
    """Return an address to show; of one that may have a password or a signature, the scheme."""
    scheme, _, rest = text.partition("://")
    return text if re.search("[@?:]", rest) is None else f"{scheme}://..."


def require_bucket(text: str, error: Callable[[str], Exception]) -> None:
    """Raise the error for anything but an address of object storage, such as s3://bucket/prefix.

    An address has no user, no key and no query: credentials are the environment's.

    error: makes the error of a message.
    """
    if BUCKET_PATTERN.fullmatch(text) is None:
        raise error(
            f"{_hide_credentials(text)} is no address of object storage. Expected "
            f"s3://BUCKET/PREFIX of letters, digits and . _ = + -, no part of it . or .., without "
            f"credentials: these are the environment's"
        )


def require_no_address(text: str, error: Callable[[str], Exception]) -> None:
    """Raise the error for SCHEME://..., which would be a folder `SCHEME:` where a path is expected.

    error: makes the error of a message.
    """
    if ADDRESS_PATTERN.match(text):
        shown, is_bucket = _hide_credentials(text), is_in_bucket(text)
        by_curl = "" if is_bucket else f"such as by `curl -LO {shlex.quote(shown)}` or "
        raise error(
            f"{shown} is an address, where nothing is read or written: expected a path of this "
            f"machine. Fetch it first, {by_curl}by a client of the storage, or mount the storage, "
            f"and give that path{BUCKET_ADVICE * is_bucket}"
        )
