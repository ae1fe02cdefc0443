"""The program of a process that runs a server, and ends it where its own parent ends in any way."""

from __future__ import annotations

import subprocess
from collections import deque

LAST_LINES = 5


def answer(command: list[str]) -> str:
    """Run a program until it ends; how it ended, with its last words."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        last = deque(process.stdout or (), LAST_LINES)
    return f"exit code {process.returncode}; its last words: {' '.join(last)[-400:].strip()}"
