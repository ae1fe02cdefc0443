"""The order of test files names files that exist, each once."""

from __future__ import annotations

from pathlib import Path

from tests.slow_files import SLOW_FILES, TESTS, position


def test_every_slow_file_exists_and_is_named_once() -> None:
    assert [name for name in SLOW_FILES if not (TESTS / name).is_file()] == []
    assert len(set(SLOW_FILES)) == len(SLOW_FILES)


def test_slow_files_come_in_their_order_and_before_all_others() -> None:
    places = [position(TESTS / name) for name in SLOW_FILES]
    assert places == sorted(places)
    assert places[-1] < position(Path(__file__))
