"""A tokenized split: flat arrays in memory, and the files that they are mapped from.

SPLIT.tokens, .target_mask, .starts, .lines, .contents and .beginnings have the arrays of a
TokenizedSplit as raw little-endian bytes; MANIFEST.json has their sizes and hashes. A file that
differs from it is refused.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nested_core.data.data_settings import SPLITS
from nested_core.errors import DamagedError
from nested_core.models.chat_template import Tokenizer
from nested_core.records.dataset import FilePart, find_place
from nested_core.storage.manifest import read_manifest, verify_manifest, write_manifest
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular, read_regular

Int32 = np.typing.NDArray[np.int32]
Int64 = np.typing.NDArray[np.int64]
UInt64 = np.typing.NDArray[np.uint64]
Bool = np.typing.NDArray[np.bool_]


# The files of a split are named after the arrays of TokenizedSplit.
DTYPE_BY_ARRAY: dict[str, np.dtype[np.generic]] = {
    "tokens": np.dtype("<i4"),
    "target_mask": np.dtype(np.bool_),
    "starts": np.dtype("<i8"),
    "lines": np.dtype("<i4"),
    "contents": np.dtype("<u8"),
    "beginnings": np.dtype("<u8"),
}


def draw_rows(total: int, most: int) -> list[int]:
    """Return at most `most` of so many row numbers, drawn with a fixed seed, in rising order.

    At even distances they would all be of one kind where kinds alternate.
    """
    drawn = np.random.default_rng(0).choice(total, min(total, most), replace=False)
    return sorted(drawn.tolist())


@dataclass(frozen=True, eq=False)
class TokenizedSplit:
    """All examples of a split, one after the other.

    tokens: int32 [sum of lengths].
    target_mask: whether the loss counts the token, bool [sum of lengths]; False at the first
        position of an example, which nothing predicts.
    starts: where each example begins and the last one ends, int64 [n + 1].
    lines: each example's line number in its original file, int32 [n].
    contents: the digest of each example's content, see `digest_with_beginnings`, uint64 [n].
    beginnings: the digests of what examples begin with up to an answer that the loss counts, see
        `digest_with_beginnings`, uint64 [number of such answers]; empty under `supervise: last`.
    maps: the memory-mapped files of the arrays.
    """

    tokens: Int32
    target_mask: Bool
    starts: Int64
    lines: Int32
    contents: UInt64
    beginnings: UInt64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    maps: tuple[mmap.mmap, ...] = ()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.starts) - 1

    @property
    def lengths(self) -> Int64:
        """The number of tokens of each example, int64 [n]."""
        return np.diff(self.starts)

    def example(self, index: int) -> Int32:
        """Return the tokens of one example, int32 [length], as a view."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def example_mask(self, index: int) -> Bool:
        """Return the target mask of one example, bool [length], as a view."""
        return self.target_mask[self.starts[index] : self.starts[index + 1]]

    def count_supervised(self) -> Int64:
        """Return how many tokens of each example the loss counts, int64 [n]."""
        counts = np.zeros(len(self), np.int64)
        full = np.flatnonzero(self.lengths)
        if len(full):
            counts[full] = np.add.reduceat(self.target_mask, self.starts[full], dtype=np.int64)
        self.release_pages()
        return counts

    def release_pages(self) -> None:
        """Release the memory pages of the mapped files, so that they do not stay in memory."""
        for mapped in self.maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def write_token_part(part: Path, **arrays: object) -> None:
    """Write concatenated examples' tokens, target_mask and beginnings to PART.NAME each."""
    for name, values in arrays.items():
        array_path(part, name).write_bytes(np.asarray(values, DTYPE_BY_ARRAY[name]).tobytes())


class SplitWriter:
    """Concatenates the parts of a split to files with a common prefix, and removes the parts."""

    def __init__(self, prefix: Path) -> None:
        """Open a file for each array, at PREFIX.NAME."""
        self._files = {name: array_path(prefix, name).open("wb") for name in DTYPE_BY_ARRAY}
        self._total = 0
        self._files["starts"].write(bytes(DTYPE_BY_ARRAY["starts"].itemsize))

    def append_part(self, part: Path, examples: np.typing.NDArray[np.void]) -> None:
        """Append the files that `write_token_part` wrote.

        examples: a record with `line`, `length` (in tokens) and `content` of each example.
        """
        for name in ("tokens", "target_mask", "beginnings"):
            path = array_path(part, name)
            self._files[name].write(read_regular(path))
            path.unlink()
        ends = self._total + np.cumsum(examples["length"], dtype=DTYPE_BY_ARRAY["starts"])
        self._files["starts"].write(ends.tobytes())
        for name, column in (("lines", "line"), ("contents", "content")):
            self._files[name].write(examples[column].astype(DTYPE_BY_ARRAY[name]).tobytes())
        self._total += int(examples["length"].sum())

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def write_manifest_and_open_tokens(folder: Path) -> dict[str, TokenizedSplit]:
    """Write the manifest of a folder with finished splits, and memory-map them."""
    write_manifest(folder, {"kind": "tokens"})
    return _memory_map_splits(folder, os.listdir(folder))


def open_tokens(folder: Path) -> dict[str, TokenizedSplit]:
    """Memory-map the splits of a data set, read-only.

    Sizes are checked each time, hashes when this process first opens the files. Raises DamagedError
    for a file that is missing, extra or changed.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise DamagedError(f"{path} is not the file of {expected['bytes']} bytes it was.")
    _verify_manifest_once(folder.resolve(), manifest["digest"])
    return _memory_map_splits(folder, manifest["files"])


@lru_cache(maxsize=64)
def _verify_manifest_once(folder: Path, digest: str) -> None:
    """Verify all hashes of a folder once per process and manifest.

    digest: the manifest's own hash, so that new files are verified again.
    """
    verify_manifest(folder)


def _memory_map_splits(folder: Path, files: Collection[str]) -> dict[str, TokenizedSplit]:
    """Memory-map the splits among the files; FileNotFoundError if one was removed meanwhile."""
    present = [split for split in SPLITS if array_path(Path(split), "starts").name in files]
    return {split: _memory_map_split(folder / split) for split in present}


def _memory_map_split(prefix: Path) -> TokenizedSplit:
    """Memory-map the arrays of one split."""
    arrays: dict[str, Any] = {}
    maps = []
    for name, dtype in DTYPE_BY_ARRAY.items():
        with open_regular(array_path(prefix, name), UNBOUNDED) as (file, size):
            if not size:  # an empty file cannot be mapped
                arrays[name] = np.zeros(0, dtype)
                continue
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        arrays[name] = np.frombuffer(maps[-1], dtype)
    return TokenizedSplit(**arrays, maps=tuple(maps))


def array_path(prefix: Path, name: str) -> Path:
    """Return the path of the file of a split's array."""
    return prefix.with_name(f"{prefix.name}.{name}")


# What SentencePiece writes for a space; decoding one token alone drops it.
_SENTENCEPIECE_SPACE = "\u2581"


@dataclass(frozen=True)
class ShownToken:
    """One token for display: its decoded text, or its name if it is a part of a character."""

    id: int
    text: str
    supervised: bool


@dataclass(frozen=True)
class ShownExample:
    """One example after truncation for display, with its file and line."""

    file: str
    line: int
    tokens: tuple[ShownToken, ...]


def decode_examples_for_display(
    split: TokenizedSplit,
    file: str,
    tokenizer: Tokenizer,
    count: int,
    parts: Sequence[FilePart] = (),
) -> list[ShownExample]:
    """Decode the first `count` examples of a split, token by token.

    tokenizer: the one that the split was tokenized with. parts: the split's files, if several.
    """
    shown = []
    for index in range(min(count, len(split))):
        mask = split.example_mask(index).tolist()
        tokens = tuple(
            ShownToken(token, _decode_token(token, tokenizer), is_supervised)
            for token, is_supervised in zip(split.example(index).tolist(), mask, strict=True)
        )
        shown.append(ShownExample(*find_place(parts, file, int(split.lines[index])), tokens))
    return shown


def _decode_token(token: int, tokenizer: Tokenizer) -> str:
    """Decode one token to its text, or its name if it is a part of a character."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    if _SENTENCEPIECE_SPACE in name:
        return name.replace(_SENTENCEPIECE_SPACE, " ")
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return name if "\ufffd" in text else text
