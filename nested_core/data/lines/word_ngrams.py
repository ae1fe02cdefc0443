"""Word n-grams of many texts at once, by which near-duplicates are found.

A word is a run of letters, digits and underscores in small letters; punctuation falls away and all
digits count as one, so that "Order 17, please!" has the n-grams of "order 23 please".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from polars._typing import PolarsDataType

NGRAM_LENGTH = 3
# Of a text with more, those whose hash ends in enough zero bits: the same ones in every text.
MAX_NGRAMS_PER_TEXT = 32
MAX_CHARACTERS = 4_000_000  # of a text that is compared; words take some 15 bytes a character
NGRAM_SCHEMA: dict[str, PolarsDataType] = {
    "words": pl.UInt64,  # equal for equal sequences of words, digits as they are; null without one
    "ngrams": pl.List(pl.UInt32),  # a sample of its NGRAM_LENGTH-word sequences, digits folded
    "halvings": pl.UInt8,  # how often the sample was halved: 2 ** halvings times as many are there
}
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
# Odd numbers, so that the order of the words matters.
_HASH_FACTORS = tuple(np.uint64(factor) for factor in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 1))


def make_word_ngram_columns(texts: pl.Series) -> dict[str, pl.Series]:
    """The columns of NGRAM_SCHEMA for each text, with hashes that are the same in every process.

    A text of more than MAX_CHARACTERS has no words: it is compared with none.
    """
    compared = texts.set(texts.str.len_chars() > MAX_CHARACTERS, "")
    words = compared.str.to_lowercase().str.extract_all(r"\w+")
    counts = words.list.len().fill_null(0)
    sequence = words.list.join(" ")
    key = pl.select(pl.when(counts > 0).then(sequence.hash(seed=0))).to_series()
    flat = words.filter(counts > 0).explode()
    hashes = flat.str.replace_all(r"\d", "0").hash(seed=0).to_numpy()
    ngrams, owners = _hash_neighbouring_words(hashes, counts.to_numpy())
    sizes = np.bincount(owners, minlength=len(texts))
    halvings = np.ceil(
        np.log2(np.maximum(sizes, MAX_NGRAMS_PER_TEXT) / MAX_NGRAMS_PER_TEXT)
    ).astype(np.uint8)
    zeros = (np.uint64(1) << halvings[owners].astype(np.uint64)) - np.uint64(1)
    is_sampled = ngrams & zeros == 0
    sampled = pl.DataFrame(
        {"owner": owners[is_sampled], "ngrams": (ngrams[is_sampled] >> np.uint64(32))},
        schema={"owner": pl.UInt32, "ngrams": pl.UInt32},
    )
    lists = sampled.group_by("owner", maintain_order=True).agg("ngrams")
    rows = pl.DataFrame({"owner": pl.int_range(len(texts), dtype=pl.UInt32, eager=True)})
    joined = rows.join(lists, on="owner", how="left", maintain_order="left")["ngrams"]
    return {"words": key, "ngrams": joined, "halvings": pl.Series(halvings)}


def _hash_neighbouring_words(hashes: Hashes, counts: np.ndarray[Any, Any]) -> tuple[Hashes, Any]:
    """The hash of each LENGTH neighbouring words, and the index of the text that they are in."""
    texts = np.repeat(np.arange(len(counts)), counts)
    windows = max(0, len(hashes) - NGRAM_LENGTH + 1)
    ngrams = np.zeros(windows, np.uint64)
    for place, factor in enumerate(_HASH_FACTORS):
        ngrams += hashes[place : place + windows] * factor
    ngrams ^= ngrams >> np.uint64(29)  # the low bits, which choose the sample, need the high ones
    is_within = texts[:windows] == texts[NGRAM_LENGTH - 1 : NGRAM_LENGTH - 1 + windows]
    return ngrams[is_within], texts[:windows][is_within]
