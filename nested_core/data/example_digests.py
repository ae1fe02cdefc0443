"""Digests of single examples, to recognize rows that an adapter was trained on.

A digest is the first 8 bytes of a SHA-256 over the example's tokens. A version's provenance has
those of all training examples of the adapter and of the versions that it was trained from.
"""

from __future__ import annotations

import base64
import binascii
import warnings
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from nested_core.data.tokens.tokenized_split import TokenizedSplit

Digests = npt.NDArray[np.uint64]
DIGEST_BYTES = 8
MAX_RECORDED_DIGESTS = 4_000_000  # 43 MB in provenance.json, which may have 64


def digest_examples(split: TokenizedSplit) -> Digests:
    """Return the digest of each example's tokens, uint64 [n]."""
    digests = b"".join(
        sha256(split.example(index).tobytes()).digest()[:DIGEST_BYTES]
        for index in range(len(split))
    )
    split.release_pages()
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def digest_prompts(split: TokenizedSplit) -> Digests:
    """Return the digest of each example's prompt, uint64 [n].

    The prompt is what comes before the first learnt token. For an example without a prompt, such as
    plain text, it is the digest of the whole example.
    """
    digests = []
    for index in range(len(split)):
        example, learnt = split.example(index), split.example_mask(index)
        first = int(learnt.argmax()) if learnt.any() else 0
        prompt = example[:first] if first > 1 else example
        digests.append(sha256(prompt.tobytes()).digest()[:DIGEST_BYTES])
    split.release_pages()
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def encode_digests(digests: Digests) -> str | None:
    """Encode the distinct digests as sorted base64 text; None if they are too many to record.

    A warning then says that later verdicts cannot leave out these examples.
    """
    distinct = np.unique(digests)
    if distinct.size > MAX_RECORDED_DIGESTS:
        warnings.warn(
            f"The registry does not record the {distinct.size:,} examples that this adapter and "
            f"its ancestors were trained on, for they are more than {MAX_RECORDED_DIGESTS:,}: "
            f"later verdicts cannot leave them out of their held-out examples.",
            stacklevel=3,
        )
        return None
    return base64.b64encode(distinct.astype("<u8").tobytes()).decode()


def decode_digests(text: Any) -> Digests:
    """Decode what `encode_digests` returned; empty for None and anything else."""
    try:
        content = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        return np.frombuffer(content, "<u8").astype(np.uint64)
    except (binascii.Error, ValueError):
        return np.zeros(0, np.uint64)
