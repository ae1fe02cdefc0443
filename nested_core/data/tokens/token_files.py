"""The tokens of a data set in a folder, written as they are made and read through memory maps.

SPLIT.tokens, .supervised, .starts and .lines hold the arrays of a TokenizedSplit as raw little-
endian bytes; MANIFEST.json has their sizes and hashes. What differs from it is refused.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from nested_core.data.settings import SPLITS
from nested_core.data.tokens.split import TokenizedSplit
from nested_core.errors import DamagedError
from nested_core.storage.manifest import read_manifest, verify_manifest, write_manifest

TOKENS, SUPERVISED, STARTS, LINES = "tokens", "supervised", "starts", "lines"
Numbers = np.ndarray[Any, Any]
DTYPES: dict[str, np.dtype[Any]] = {
    TOKENS: np.dtype("<i4"),
    SUPERVISED: np.dtype(np.bool_),
    STARTS: np.dtype("<i8"),
    LINES: np.dtype("<i4"),
}
_COPIED_BYTES = 2**20


class ExampleWriter:
    """Appends examples to PREFIX.tokens and their flags to PREFIX.supervised."""

    def __init__(self, prefix: Path) -> None:
        self._tokens = _named(prefix, TOKENS).open("wb")
        self._supervised = _named(prefix, SUPERVISED).open("wb")

    def add(self, tokens: Sequence[int], supervised: bytes | bytearray) -> None:
        """Append one example; `supervised` is one byte a token, 0 or 1."""
        self._tokens.write(np.asarray(tokens, DTYPES[TOKENS]).tobytes())
        self._supervised.write(supervised)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._tokens.close()
        self._supervised.close()


class SplitWriter:
    """Joins the parts of a split, in order, in PREFIX.*; the files of a part are removed."""

    def __init__(self, prefix: Path) -> None:
        self._files = {name: _named(prefix, name).open("wb") for name in DTYPES}
        self._total = 0
        self._files[STARTS].write(bytes(DTYPES[STARTS].itemsize))

    def join(self, part: Path, lines: Numbers, lengths: Numbers) -> None:
        """Append what an ExampleWriter wrote under `part`: examples of these lines and lengths."""
        for name in (TOKENS, SUPERVISED):
            path = _named(part, name)
            with path.open("rb") as file:
                while piece := file.read(_COPIED_BYTES):
                    self._files[name].write(piece)
            path.unlink()
        ends = self._total + np.cumsum(lengths, dtype=DTYPES[STARTS])
        self._files[STARTS].write(ends.tobytes())
        self._files[LINES].write(lines.astype(DTYPES[LINES]).tobytes())
        self._total += int(lengths.sum())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()


def seal_tokens(folder: Path) -> dict[str, TokenizedSplit]:
    """Write the manifest over a folder whose splits are written, and map them."""
    write_manifest(folder, {"kind": "tokens"})
    return _map_splits(folder, os.listdir(folder))


def open_tokens(folder: Path) -> dict[str, TokenizedSplit]:
    """The splits of a data set, read-only, mapped: what is read of them is read from the disk.

    Sizes are checked each time, hashes when this process first opens these files. Raises
    DamagedError for a file that is missing, extra or changed.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise DamagedError(f"{path} is not the file of {expected['bytes']} bytes it was.")
    _verify_once(folder.resolve(), manifest["digest"])
    return _map_splits(folder, manifest["files"])


@lru_cache(maxsize=64)
def _verify_once(folder: Path, digest: str) -> None:
    """`digest` is the manifest's own: new files in an old place are verified anew."""
    verify_manifest(folder)


def _map_splits(folder: Path, files: Collection[str]) -> dict[str, TokenizedSplit]:
    """The splits that are among the files; FileNotFoundError where one has gone meanwhile."""
    found = [split for split in SPLITS if _named(Path(split), STARTS).name in files]
    return {split: _map_split(folder / split) for split in found}


def _map_split(prefix: Path) -> TokenizedSplit:
    arrays: dict[str, Any] = {}
    maps = []
    for name, dtype in DTYPES.items():
        with _named(prefix, name).open("rb") as file:
            if not file.seek(0, 2):  # what is empty cannot be mapped
                arrays[name] = np.zeros(0, dtype)
                continue
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        arrays[name] = np.frombuffer(maps[-1], dtype)
    return TokenizedSplit(**arrays, maps=tuple(maps))


def _named(prefix: Path, name: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{name}")
