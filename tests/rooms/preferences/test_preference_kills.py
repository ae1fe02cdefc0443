"""Runs of dpo killed at drawn moments end with the bytes of one that nobody killed.

What is compared stands in tests/reliability/kills.py; of these runs also the reference's kept
likelihoods.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "tests.rooms.preferences.kills"


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(3, marks=pytest.mark.slow("trains in processes that are killed")),
        pytest.param(30, marks=[pytest.mark.reliability, pytest.mark.timeout(7200)]),
    ],
)
def test_a_run_killed_at_drawn_moments_ends_with_the_same_bytes(tmp_path: Path, kills: int) -> None:
    command = [sys.executable, "-m", PROGRAM, str(kills), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{kills} kills in " in done.stdout
