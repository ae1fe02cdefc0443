"""The program of a process that runs a server, and ends it where its own parent ends in any way."""

from __future__ import annotations

import subprocess


def answer(request: tuple[list[str], str]) -> int:
    """Run a command until it ends; its exit code, negative for a signal.

    request: the command, and the path of the file that what it prints is written to.
    """
    command, log = request
    with open(log, "wb") as printed:
        return subprocess.run(command, stdout=printed, stderr=subprocess.STDOUT).returncode
