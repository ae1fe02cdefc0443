"""Files of unknown origin: hashed in pieces, and refused where they are no plain files."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest

from nested_core.errors import DamagedError
from nested_core.storage.strict_files import regular_sha256

MIB = 1024 * 1024


def test_a_large_file_is_hashed_without_being_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(256 * MIB)
    tracemalloc.start()
    try:
        digest = regular_sha256(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert digest == hashlib.sha256(bytes(256 * MIB)).hexdigest()
    assert peak < 2 * MIB


def test_what_is_no_regular_file_is_not_hashed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(DamagedError, match="is not a file"):
            regular_sha256(path)
    with pytest.raises(DamagedError, match="is missing"):
        regular_sha256(tmp_path / "nothing")
