"""Word n-grams of many texts at once, by which near-duplicates are found.

A word is a run of letters, digits and underscores in small letters; punctuation falls away and all
digits count as one, so that "Order 17, please!" has the n-grams of "order 23 please".
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from string import ascii_letters, digits
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
Indices = np.ndarray[Any, np.dtype[np.int64]]
# Odd numbers, so that the order of the words matters.
_HASH_FACTORS = tuple(np.uint64(factor) for factor in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 1))
_SEQUENCE_FACTOR = 0xD6E8FEB86659FD93
_MIXING_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_BYTES_A_LOAD = 8
_MAX_LOADED_BYTES = 64  # a longer word is hashed by itself
_WORD_BYTES = frozenset((ascii_letters + digits + "_").encode()) | frozenset(range(128, 256))
# ASCII in small letters, 0 for what is in no word; bytes of other letters stay.
_SMALL_LETTERS = bytes(byte if byte in _WORD_BYTES else 0 for byte in bytes(range(256)).lower())
_FOLDED_DIGITS = bytes(ord("0") if chr(byte) in digits else byte for byte in range(256))
_KEPT_BITS = np.array([(1 << 8 * count) - 1 for count in range(_BYTES_A_LOAD + 1)], np.uint64)


@dataclass(frozen=True, eq=False)
class WordNgrams:
    """Hashes of the words of texts, which are the same in every process.

    words: uint64 [texts], equal for equal sequences of words, digits as they are; 0 without a word.
    ngrams: uint32, a sample of the NGRAM_LENGTH-word sequences of all texts, digits folded.
    owners: int64, the index of the text that each n-gram is in, ascending.
    halvings: uint8 [texts], how often a text's sample was halved.
    """

    words: Hashes
    ngrams: np.ndarray[Any, np.dtype[np.uint32]]
    owners: Indices
    halvings: np.ndarray[Any, np.dtype[np.uint8]]

    def to_columns(self) -> dict[str, pl.Series]:
        """The columns of NGRAM_SCHEMA, a row each text."""
        sampled = pl.DataFrame(
            {"owner": self.owners, "ngrams": self.ngrams},
            schema={"owner": pl.Int64, "ngrams": pl.UInt32},
        )
        lists = sampled.group_by("owner", maintain_order=True).agg("ngrams")
        rows = pl.DataFrame({"owner": pl.int_range(len(self.words), dtype=pl.Int64, eager=True)})
        joined = rows.join(lists, on="owner", how="left", maintain_order="left")["ngrams"]
        words = pl.Series(self.words)
        return {
            "words": words.set(words == 0, None),
            "ngrams": joined,
            "halvings": pl.Series(self.halvings),
        }


def hash_word_ngrams(texts: pl.Series) -> WordNgrams:
    """The words of each text as hashes; null and a text of more than MAX_CHARACTERS have none."""
    compared = texts.set(texts.str.len_chars() > MAX_CHARACTERS, "").fill_null("")
    is_ascii = compared.str.len_bytes() == compared.str.len_chars()
    if not is_ascii.all():  # what only Unicode knows of small letters and words
        others = compared.filter(~is_ascii).str.to_lowercase().str.replace_all(r"\W", " ")
        compared = compared.scatter((~is_ascii).arg_true(), others)
    hashes, folded, counts = _hash_words(compared)
    if not is_ascii.all():
        has_digits = compared.str.contains(r"[\d&&[^0-9]]")
        if has_digits.any():
            unfolded = compared.filter(has_digits).str.replace_all(r"\d", "0")
            folded[np.repeat(has_digits.to_numpy(), counts)] = _hash_words(unfolded)[1]
    ngrams, owners = _hash_neighbouring_words(folded, counts)
    sizes = np.bincount(owners, minlength=len(texts))
    halvings = np.ceil(
        np.log2(np.maximum(sizes, MAX_NGRAMS_PER_TEXT) / MAX_NGRAMS_PER_TEXT)
    ).astype(np.uint8)
    zeros = (np.uint64(1) << halvings[owners].astype(np.uint64)) - np.uint64(1)
    is_sampled = ngrams & zeros == 0
    return WordNgrams(
        words=_hash_sequences(hashes, counts),
        ngrams=(ngrams[is_sampled] >> np.uint64(32)).astype(np.uint32),
        owners=owners[is_sampled],
        halvings=halvings,
    )


def _hash_words(texts: pl.Series) -> tuple[Hashes, Hashes, Indices]:
    """Hashes of all words, with digits as they are and folded, and how many each text has.

    Each byte beyond ASCII counts as one of a word.
    """
    lengths = texts.str.len_bytes().to_numpy().astype(np.int64)
    joined = b"\n" + texts.str.join("\n").item().encode() + bytes(2 * _BYTES_A_LOAD)
    small = joined.translate(_SMALL_LETTERS)
    is_word = np.frombuffer(small, np.uint8) != 0
    edges = np.flatnonzero(is_word[1:] != is_word[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    ends_of_texts = np.cumsum(lengths + 1)
    counts = np.diff(np.searchsorted(starts, ends_of_texts, side="right"), prepend=0)
    hashes = _hash_byte_ranges(small, starts, ends)
    return hashes, _hash_byte_ranges(small.translate(_FOLDED_DIGITS), starts, ends), counts


def _hash_byte_ranges(content: bytes, starts: Indices, ends: Indices) -> Hashes:
    """A hash of each range of bytes; `content` has _BYTES_A_LOAD bytes more behind the last."""
    loads = np.ndarray(
        (len(content) - _BYTES_A_LOAD + 1,), dtype="<u8", buffer=content, strides=(1,)
    )
    lengths = ends - starts
    hashes = _mix(loads[starts] & _KEPT_BITS[np.minimum(lengths, _BYTES_A_LOAD)])
    for offset in range(_BYTES_A_LOAD, _MAX_LOADED_BYTES, _BYTES_A_LOAD):
        longer = np.flatnonzero(lengths > offset)
        if not len(longer):
            return hashes
        kept = _KEPT_BITS[np.minimum(lengths[longer] - offset, _BYTES_A_LOAD)]
        hashes[longer] = _mix(
            hashes[longer] * _HASH_FACTORS[0] + (loads[starts[longer] + offset] & kept)
        )
    for index in np.flatnonzero(lengths > _MAX_LOADED_BYTES).tolist():
        word = content[starts[index] : ends[index]]
        hashes[index] = int.from_bytes(blake2b(word, digest_size=8).digest(), "little")
    return hashes


def _mix(values: Hashes) -> Hashes:
    """A bijection of 64 bits in which every bit of the result depends on most of the value's."""
    mixed = (values ^ (values >> np.uint64(30))) * _MIXING_FACTOR
    return mixed ^ (mixed >> np.uint64(27))


def _hash_sequences(hashes: Hashes, counts: Indices) -> Hashes:
    """A hash of all words of each text in their order; 0 for a text without one."""
    sequences = np.zeros(len(counts), np.uint64)
    has_words = counts > 0
    if not has_words.any():
        return sequences
    starts = np.cumsum(counts) - counts
    powers = np.full(int(counts.max()), _SEQUENCE_FACTOR, np.uint64).cumprod()
    places = np.arange(len(hashes)) - np.repeat(starts, counts)
    sums = np.add.reduceat(hashes * powers[places], starts[has_words])
    sequences[has_words] = np.maximum(_mix(sums), 1)
    return sequences


def _hash_neighbouring_words(hashes: Hashes, counts: Indices) -> tuple[Hashes, Indices]:
    """The hash of each LENGTH neighbouring words, and the index of the text that they are in."""
    texts = np.repeat(np.arange(len(counts)), counts)
    windows = max(0, len(hashes) - NGRAM_LENGTH + 1)
    ngrams = np.zeros(windows, np.uint64)
    for place, factor in enumerate(_HASH_FACTORS):
        ngrams += hashes[place : place + windows] * factor
    ngrams ^= ngrams >> np.uint64(29)  # the low bits, which choose the sample, need the high ones
    is_within = texts[:windows] == texts[NGRAM_LENGTH - 1 : NGRAM_LENGTH - 1 + windows]
    return ngrams[is_within], texts[:windows][is_within]
