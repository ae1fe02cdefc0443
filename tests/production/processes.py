"""Processes of the production tests: each in a session of its own, all stopped at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def start_logged(
    command: Sequence[str], log: Path, cwd: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a process whose output goes to the end of a file."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes], seconds: float = 40) -> int:
    """Ask a process to end, and kill its whole session where it does not."""
    process.terminate()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def command_of(process: int) -> str:
    """The command line of a process; empty once it has ended."""
    try:
        return (Path("/proc") / str(process) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def processes_with(text: str) -> list[int]:
    """The processes whose environment holds a text, such as the name of a test's folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended, or is another user's
            continue
    return sorted(found)


def seconds_of_children(process: int) -> float:
    """CPU seconds of the children that a process has waited for, and of theirs (proc(5))."""
    fields = (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")
