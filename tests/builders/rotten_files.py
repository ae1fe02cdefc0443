"""Files whose bytes changed below the file system, which sets no new change time."""

from __future__ import annotations

from pathlib import Path

import pytest

from nested_core.storage import kept_hashes
from nested_core.storage.kept_hashes import cached_sha256
from nested_core.storage.untrusted_files import regular_sha256
from nested_core.storage.user_cache import cache_folder


def rot(path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change a byte of a file, whose cached hash stays that of the bytes before, as on a bad disk.

    Its change time cannot be reset, so the cache is told the old hash under the new one.
    """
    monkeypatch.setattr(kept_hashes, "MIN_FILE_AGE_TO_KEEP_HASH", -1.0)
    before = regular_sha256(path)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    (after,) = cached_sha256([path])
    (entry,) = (one for one in (cache_folder() / "hashes").iterdir() if one.read_text() == after)
    entry.write_text(before)
