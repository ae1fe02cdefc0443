"""A reader of a foreign file is ended at its limits, by what the file takes on disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from nested_core.errors import ChildFailed
from nested_core.process import cell
from nested_core.process.cell import Cell, size_without_holes

READER = """
import os

def answer(request):
    word, count = request
    if word == "memory":
        return len(b"x" * count)
    if word == "slowly":
        held = [b"x" * 2**20 for _ in range(count >> 20)]
        return len(held)
    if word == "endless":
        while True:
            pass
    if word == "abort":
        os.abort()
    return word
"""
MIB = 2**20


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    (tmp_path / "reader.py").write_text(READER)
    return tmp_path / "reader.py"


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "BASE_BYTES", 64 * MIB)
    monkeypatch.setattr(cell, "BASE_SECONDS", 1.0)


def write_file(path: Path, size: int) -> Path:
    path.write_bytes(b"x" * size)
    return path


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (("memory", 2**40), "it took more than 67 MB of memory"),
        (("memory", 2**30), "it took more than 67 MB of memory"),
        (("slowly", 2**30), "it took more than 67 MB of memory"),
        (("endless", 0), "it took more than 1 seconds of processor time"),
        (("abort", 0), "its process was ended by SIGABRT"),
    ],
)
def test_a_reader_is_ended_at_its_limits(reader, tmp_path, request_, said) -> None:
    if request_[1] == 2**40 and sys.platform != "linux":
        pytest.skip("the address space is not limited here")
    path = write_file(tmp_path / "file", 10)
    with Cell.for_file(reader, path, bytes_per_byte=16) as reading:
        assert reading.ask(("word", 0)) == "word"
        with pytest.raises(ChildFailed) as ended:
            reading.ask(request_)
    assert str(ended.value) == said


@pytest.mark.usefixtures("small_limits")
def test_a_larger_file_may_take_more(reader, tmp_path) -> None:
    path = write_file(tmp_path / "file", 8 * MIB)
    with Cell.for_file(reader, path, bytes_per_byte=16) as reading:
        assert reading.ask(("slowly", 128 * MIB)) == 128
    with (
        Cell.for_file(reader, path, bytes_per_byte=1) as reading,
        pytest.raises(ChildFailed, match="more than 75 MB"),
    ):
        reading.ask(("slowly", 128 * MIB))


def test_a_file_counts_by_what_it_takes_on_disk(tmp_path) -> None:
    path = write_file(tmp_path / "file", 5000)
    assert size_without_holes(path) == 5000
    os.truncate(path, 2**30)
    assert size_without_holes(path) <= MIB
    hole = tmp_path / "hole"
    hole.touch()
    os.truncate(hole, 2**30)
    assert size_without_holes(hole) == 0
