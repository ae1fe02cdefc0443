"""Digests and versions of a registry (64 hexadecimal digits) as a person reads them."""

from __future__ import annotations

SHOWN_DIGITS = 12


def shorten_digest(digest: str) -> str:
    """The start of a digest or a version, enough to find it by."""
    return digest[:SHOWN_DIGITS]
