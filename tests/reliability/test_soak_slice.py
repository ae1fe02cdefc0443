"""A slice of the proof by volume: every kill is made good, to the bit.

What is asserted stands in kills.py; the figures of the whole are in benchmarks/faults.md.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLS = [pytest.mark.slow("trains in processes that are killed, and to an end for comparison")]
FULL = [pytest.mark.reliability, pytest.mark.timeout(7200)]


@pytest.mark.parametrize(
    ("volume", "count", "figures"),
    [
        pytest.param("--kills", 2, "2 kills in ", marks=KILLS),
        pytest.param("--kills", 100, "100 kills in ", marks=FULL),
        pytest.param("--replay-kills", 20, "20 kills in ", marks=FULL),
    ],
)
def test_what_was_killed_is_made_good(
    tmp_path: Path, volume: str, count: int, figures: str
) -> None:
    command = [sys.executable, "-m", "tests.reliability.soak", volume, str(count)]
    command += ["--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert figures in done.stdout
