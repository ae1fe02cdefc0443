"""Processes of the production tests: each in a session of its own, all stopped at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from nested_core.records.metrics import read_metrics

RANK_PROGRAM = "nested_core.rooms.ranks.rank_worker"


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


def ranks_of(folder: Path) -> dict[int, int]:
    """The process ids of the ranks that train in a folder's run, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((e for e in environment if e.startswith(b"MLX_RANK=")), None)
        if (
            rank is not None
            and RANK_PROGRAM.encode() in words
            and str(folder / "run").encode() in words
        ):
            found[int(rank.split(b"=")[1])] = int(entry.name)
    return found


def step_of(metrics: Path) -> int:
    """The step of the last record of metrics.jsonl; -1 without any."""
    records = read_metrics(metrics)
    return int(records[-1]["step"]) if records else -1


def seconds_of_children(process: int) -> float:
    """CPU seconds of the children that a process has waited for, and of theirs (proc(5))."""
    fields = (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")
