"""Digests and versions of a registry (64 hexadecimal digits) as a person reads them."""

from __future__ import annotations

SHOWN_DIGITS = 12


def shorten_digest(digest: str) -> str:
    """Return the first SHOWN_DIGITS digits of a digest or version, enough to identify it."""
    return digest[:SHOWN_DIGITS]
