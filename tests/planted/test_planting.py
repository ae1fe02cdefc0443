"""Faults are planted where they belong."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nested_core.seams import is_there
from tests.planted.faults import FAULTS
from tests.planted.planting import Fault, Misplaced, plant

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """\
def sign(number):
    if number > 0:
        return 1
    return -1 if number < 0 else 0

print(sign(5), sign(-5))
"""


def fault(old: str, new: str) -> Fault:
    return Fault("room/program.py", old, new, "a test")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "program.py").write_text(PROGRAM)
    return tmp_path


def run(root: Path) -> str:
    command = [sys.executable, str(root / "room" / "program.py")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_planted_fault_changes_what_the_program_does_and_can_be_taken_back(root: Path) -> None:
    before = plant(fault("number > 0", "number >= 9"), root)
    assert run(root) == "0 -1\n"
    (root / "room" / "program.py").write_text(before)
    assert run(root) == "1 -1\n"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("number > 1", "number > 0", "holds 0 times"),
        ("return", "yield", "holds 2 times"),
        ("number > 0", "number >", "is no program any more"),
        ("number > 0", "number >  0", "does the same"),
    ],
)
def test_a_fault_that_cannot_be_planted_is_refused(root, old, new, reason) -> None:
    with pytest.raises(Misplaced, match=reason):
        plant(fault(old, new), root)


def test_there_are_fifty_faults_and_two_in_each_room_at_least() -> None:
    rooms = {path.stem for path in (ROOT / "nested_core").iterdir() if path.suffix in ("", ".py")}
    rooms = (rooms | {"flows", "tasks"}) - {"__init__", "__pycache__", "py"}
    counts = Counter(fault.room for fault in FAULTS)
    assert len(FAULTS) == 50
    assert {room for room in rooms if counts[room] < 2} == set()


def test_each_fault_has_its_place() -> None:
    here = [f for f in FAULTS if "/rooms/" not in f.path or is_there(Path(f.path).parts[2])]
    counts = {f.old: (ROOT / f.path).read_text("utf-8").count(f.old) for f in here}
    assert [old for old, count in counts.items() if count != 1] == []
