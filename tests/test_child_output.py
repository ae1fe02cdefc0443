"""A failure shows what the test's processes printed."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

FILE = """
import subprocess, sys
from tests.child_output import note_output

def run(program, check):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=check)

def test_checked():
    run("import sys; print('before the end'); sys.exit('because of this')", True)

def test_asserted():
    done = run("import sys; sys.exit('it says why')", False)
    note_output("the program", done.returncode, done.stdout, done.stderr)
    assert done.returncode == 0

def test_that_passes():
    note_output("another", 0, "of no interest", "")
"""


def test_a_failure_shows_the_streams_of_the_tests_own_processes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FILE)
    result = pytester.runpytest_inprocess("-p", "tests.child_output")
    result.assert_outcomes(passed=1, failed=2)
    text = result.stdout.str()
    assert text.count("because of this\n") + text.count("it says why\n") == 2
    assert "stdout, exit code 1 of [" in text
    assert "stderr, exit code 1 of the program" in text
    assert "of no interest" not in text
