"""Hashes that are kept: believed only of the same file, unchanged, in a folder of one's own."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nested_core.storage import kept_hashes
from nested_core.storage.kept_hashes import cached_sha256
from nested_core.storage.untrusted_files import regular_sha256
from tests.waiting import wait_until


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the hashes are kept."""
    monkeypatch.setenv("NESTED_TUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hashes"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read."""
    paths: list[Path] = []

    def count(path: Path, *, follow_links: bool) -> str:
        paths.append(path)
        return regular_sha256(path, follow_links=follow_links)

    monkeypatch.setattr(kept_hashes, "regular_sha256", count)
    return paths


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was left alone for long enough, by the clock."""
    monkeypatch.setattr(kept_hashes, "MIN_FILE_AGE_TO_KEEP_HASH", 0.0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    later = tmp_path / "later"

    def has_ticked() -> bool:
        later.touch()
        return later.stat().st_ctime_ns > path.stat().st_ctime_ns

    wait_until(has_ticked, "the clock that change times are taken from")
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_until_it_changes(file: Path, folder: Path, hashed: list[Path]) -> None:
    for _ in range(3):
        assert cached_sha256([file]) == [sha256(b"weights")]
    assert hashed == [file]
    assert folder.stat().st_mode & 0o777 == 0o700
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(b"Weights")
    os.utime(file, ns=times)  # the kernel's change time tells it all the same
    assert cached_sha256([file]) == [sha256(b"Weights")]


PROGRAM = """
import signal, sys
from pathlib import Path
from nested_core.storage.kept_hashes import cached_sha256
signal.signal(signal.SIGINT, signal.default_int_handler)
import polars  # which has SIGINT restart what it interrupts
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
print("begins", flush=True)
cached_sha256([Path(sys.argv[1])])
"""


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_a_hole_of_a_tebibyte_is_left_at_a_signal(stop, code, folder, tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    os.truncate(path, 2**40)
    command = [sys.executable, "-c", PROGRAM, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)  # while it is hashed
        process.send_signal(stop)
        try:
            assert process.wait(10) == code
        finally:
            process.kill()


def test_a_file_that_took_anothers_name_is_read(file: Path, folder: Path) -> None:
    cached_sha256([file])
    other = file.with_name("other")
    other.write_bytes(b"heavier")
    os.utime(other, ns=(0, file.stat().st_mtime_ns))
    other.replace(file)
    assert cached_sha256([file]) == [sha256(b"heavier")]


def test_a_file_that_was_written_just_now_is_not_kept(file, folder, monkeypatch) -> None:
    monkeypatch.setattr(kept_hashes, "MIN_FILE_AGE_TO_KEEP_HASH", 60.0)
    assert cached_sha256([file]) == [sha256(b"weights")]
    assert list(folder.iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(file, folder, monkeypatch) -> None:
    def disturb(path: Path, *, follow_links: bool) -> str:
        digest = regular_sha256(path, follow_links=follow_links)
        path.write_bytes(b"changed meanwhile")
        return digest

    monkeypatch.setattr(kept_hashes, "regular_sha256", disturb)
    cached_sha256([file])
    assert list(folder.iterdir()) == []


def forge(folder: Path) -> Path:
    """Let the one entry say that the file has another hash."""
    (entry,) = folder.iterdir()
    entry.write_text("0" * 64)
    return entry


def test_an_entry_is_what_saves_the_reading(file: Path, folder: Path) -> None:
    cached_sha256([file])
    forge(folder)
    assert cached_sha256([file]) == ["0" * 64]  # who owns the folder is believed; others below


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to others")
@pytest.mark.parametrize("what", ["entry", "folder"])
def test_an_entry_of_another_user_is_not_believed(file: Path, folder: Path, what: str) -> None:
    cached_sha256([file])
    entry = forge(folder)
    os.chown(entry if what == "entry" else folder, 65534, 65534)
    assert cached_sha256([file]) == [sha256(b"weights")]


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write_in_is_not_used(file: Path, folder: Path, mode: int) -> None:
    cached_sha256([file])
    forge(folder)
    folder.chmod(mode)
    assert cached_sha256([file]) == [sha256(b"weights")]


@pytest.mark.parametrize("content", [b"", b"0" * 63, b"g" * 64, bytes(5000), b"\xff" * 64])
def test_an_entry_that_says_nothing_is_written_anew(file, folder, content) -> None:
    cached_sha256([file])
    (entry,) = folder.iterdir()
    entry.write_bytes(content)
    assert cached_sha256([file]) == [sha256(b"weights")]
    assert entry.read_text() == sha256(b"weights")


def test_an_entry_that_is_no_file_is_passed_over(file: Path, folder: Path) -> None:
    cached_sha256([file])
    (entry,) = folder.iterdir()
    entry.unlink()
    entry.symlink_to("/dev/zero")
    assert cached_sha256([file]) == [sha256(b"weights")]
    entry.unlink()
    os.mkfifo(entry)
    assert cached_sha256([file]) == [sha256(b"weights")]


def test_a_cache_that_cannot_be_written_only_costs_time(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[Path]
) -> None:
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("NESTED_TUNE_CACHE", str(tmp_path / "a-file"))
    assert cached_sha256([file, file]) == 2 * [sha256(b"weights")]
    monkeypatch.delenv("NESTED_TUNE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cached_sha256([file]) == [sha256(b"weights")]
    assert len(hashed) == 3


def test_a_hash_that_was_made_a_month_ago_goes_when_another_is_kept(file, folder, tmp_path) -> None:
    cached_sha256([file])
    (old,) = folder.iterdir()
    os.utime(old, (1, 1))
    other = tmp_path / "other"
    other.write_bytes(b"others")
    cached_sha256([other])
    assert [path.name for path in folder.iterdir()] != [old.name]
    assert len(list(folder.iterdir())) == 1
