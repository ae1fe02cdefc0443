"""Run a command; kill its process group when standard input ends, because the parent is gone.

Started by its path, in a session of its own; it imports nothing of ours. Standard input is passed
on to the command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> None:
    """Run the command to its end, or to that of whoever started this."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    threading.Thread(target=_exit_when_process_ends, args=(process,), daemon=True).start()
    assert process.stdin is not None  # noqa: S101 -- it was asked for
    while words := os.read(0, 4096):
        os.write(process.stdin.fileno(), words)
    os.killpg(0, signal.SIGKILL)


def _exit_when_process_ends(process: subprocess.Popen[bytes]) -> None:
    os._exit(abs(process.wait()))


if __name__ == "__main__":
    main(sys.argv[1:])
