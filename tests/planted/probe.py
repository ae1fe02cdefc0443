"""What a planted probe calls: note once a process which test reached it.

Processes that a test starts inherit PYTEST_CURRENT_TEST, so what they reach counts as the test's.
"""

from __future__ import annotations

import os

REACHED_VARIABLE = "NESTED_TUNE_REACHED"
_noted: set[tuple[int, str]] = set()
_open, _write, _close = os.open, os.write, os.close  # tests put others in their place


def reach(number: int) -> None:
    """Note the test in the file of REACHED_VARIABLE; "" where none runs, as at an import."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    path = os.environ.get(REACHED_VARIABLE)
    if path is None or (number, test) in _noted:
        return
    _noted.add((number, test))
    descriptor = _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    _write(descriptor, f"{number} {test}\n".encode())
    _close(descriptor)
