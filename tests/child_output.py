"""What the processes of a test printed, shown where the test fails."""

from __future__ import annotations

import subprocess
from collections import deque
from typing import Any

import pytest

SHOWN_PROCESSES = 4
SHOWN_CHARACTERS = 20_000  # of each stream, its end

_ended: deque[tuple[str, str]] = deque(maxlen=SHOWN_PROCESSES)


def note_output(command: object, code: int, stdout: str, stderr: str) -> None:
    """Keep what a process of the running test printed, or a command called in its place."""
    title = f"exit code {code} of {command}"
    for stream, text in (("stdout", stdout), ("stderr", stderr)):
        if text.strip():
            _ended.append((f"{stream}, {title}"[:200], text[-SHOWN_CHARACTERS:]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Forget what the processes of the test before printed."""
    _ended.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Any:
    """Add to the report of a failure what was printed, also by a process whose end was an error."""
    report = yield
    if call.excinfo is not None and report.failed:
        error = call.excinfo.value
        if isinstance(error, subprocess.CalledProcessError | subprocess.TimeoutExpired):
            code = getattr(error, "returncode", -1)
            note_output(error.cmd, code, _text(error.stdout), _text(error.stderr))
        report.sections.extend(_ended)
    return report


def _text(output: Any) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
