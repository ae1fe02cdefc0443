"""The order of test files names files that exist, each once."""

from __future__ import annotations

from pathlib import Path

from tests.slow_files import SLOW_FILES, position


def test_every_slow_file_exists_and_is_named_once() -> None:
    files = [path.stem for path in Path(__file__).parent.rglob("test_*.py")]
    assert [name for name in SLOW_FILES if files.count(name) != 1] == []
    assert len(set(SLOW_FILES)) == len(SLOW_FILES)


def test_slow_files_come_in_their_order_and_before_all_others() -> None:
    places = [position(Path(f"tests/{name}.py")) for name in SLOW_FILES]
    assert places == list(range(len(SLOW_FILES)))
    assert position(Path(__file__)) == len(SLOW_FILES)
