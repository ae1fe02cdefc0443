"""Digests of single examples, to recognize rows that an adapter was trained on.

A row is known by its content, whatever template, vocabulary or length it is tokenized with. A run,
a version's provenance and an export record the digests of all rows that the adapter and those that
it was trained from were trained on.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

from nested_core.data.tokens.tokenized_split import Bool, TokenizedSplit, UInt64

Digests = UInt64
DIGEST_BYTES = 8
# Changes with `digest_with_beginnings`: other records are not known.
IDENTITY = "turns without system or end texts, with beginnings"
MAX_RECORDED_DIGESTS = 4_000_000  # 43 MB in provenance.json, which may have 64


def digest_prompts(split: TokenizedSplit) -> Digests:
    """Return the digest of each example's prompt, uint64 [n].

    The prompt is what comes before the first learnt token. For an example without a prompt, such as
    plain text, it is the digest of the whole example.
    """
    digests = []
    for index in range(len(split)):
        example, first = split.example(index), int(split.example_mask(index).argmax())
        prompt = example[:first] if first > 1 else example
        digests.append(sha256(prompt.tobytes()).digest()[:DIGEST_BYTES])
    split.release_pages()
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


@dataclass(frozen=True, eq=False)
class TrainedRows:
    """The rows that an adapter and its ancestors were trained on, as far as they are known.

    digests: see `TokenizedSplit.contents` and `.beginnings`, uint64 [n].
    unknown: why not all of the rows are known; None if they are.
    """

    digests: Digests = field(default_factory=lambda: np.zeros(0, np.uint64))
    unknown: str | None = None

    def __or__(self, other: TrainedRows) -> TrainedRows:
        """Return the rows of both."""
        return TrainedRows(np.union1d(self.digests, other.digests), self.unknown or other.unknown)

    def find_in(self, held_out: Digests) -> Bool:
        """Return for each held-out example whether it is one of these rows, bool (n,)."""
        return np.isin(held_out, self.digests)

    def to_json(self) -> dict[str, str | None]:
        """Return the fields in which the run, provenance.json and an export's record keep them."""
        encoded, unknown = encode_digests(self.digests), self.unknown
        if encoded is None:
            unknown = f"they are more than {MAX_RECORDED_DIGESTS:,}, which are not recorded"
        identity = {"example_identity": IDENTITY, "unknown_examples": unknown}
        return {"training_examples": encoded, **identity}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], whose: str) -> TrainedRows:
        """Read what `to_json` returned.

        whose: names the adapter, where its rows are not recorded by their content.
        """
        if values.get("example_identity") != IDENTITY:
            return cls(unknown=f"no record says by its content which rows {whose} was trained on")
        unknown = values.get("unknown_examples")
        return cls(decode_digests(values.get("training_examples")), unknown and str(unknown))


def encode_digests(digests: Digests) -> str | None:
    """Encode the distinct digests as sorted base64 text; None if they are too many to record."""
    distinct = np.unique(digests)
    if distinct.size > MAX_RECORDED_DIGESTS:
        return None
    return base64.b64encode(distinct.astype("<u8").tobytes()).decode()


def decode_digests(text: Any) -> Digests:
    """Decode what `encode_digests` returned; empty for None and anything else."""
    try:
        content = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        return np.frombuffer(content, "<u8").astype(np.uint64)
    except (binascii.Error, ValueError):
        return np.zeros(0, np.uint64)
