"""mlx.launch as it starts ranks: it waits while they compute, and passes on input and output."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from nested_core.rooms.ranks.mlx_launch import find_consecutive_free_ports
from nested_core.rooms.ranks.rank_group import LAUNCHER_COMMAND

SECONDS_OF_SLEEP = 3


def launch_two(*command: object, **streams: Any) -> subprocess.Popen[bytes]:
    """Two ranks of a command, on this machine."""
    where = ("-n", "2", "--backend", "ring", "--starting-port", str(find_consecutive_free_ports(2)))
    launcher = [*LAUNCHER_COMMAND, *where, "--", *map(str, command)]
    return subprocess.Popen(launcher, start_new_session=True, **streams)


@pytest.mark.slow("a launcher and two ranks")
def test_the_launcher_computes_nothing_while_the_ranks_work() -> None:
    process = launch_two("sleep", SECONDS_OF_SLEEP, stdin=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stdin is not None
    process.stdin.close()
    assert process.returncode == 0
    # Without the wait it is all of the seconds; 0.4 s are the import of MLX.
    assert usage.ru_utime + usage.ru_stime < SECONDS_OF_SLEEP / 2


def test_every_rank_gets_what_is_written_and_is_heard() -> None:
    output, _ = reply_to_stop(exit_code=0)
    assert output.count(b"heard stop") == 2


def test_the_exit_code_of_a_rank_is_reported() -> None:
    _, errors = reply_to_stop(exit_code=3)
    assert b"exited with code 3" in errors


def reply_to_stop(exit_code: int) -> tuple[bytes, bytes]:
    """Standard output and error of two ranks that print the line that they are sent."""
    program = f"import sys; print('heard ' + sys.stdin.readline()); sys.exit({exit_code})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with launch_two(sys.executable, "-S", "-c", program, **pipes) as process:
        assert process.stdin is not None
        process.stdin.write(b"stop\n")
        process.stdin.flush()  # it stays open: its end is the parent's
        assert process.stdout is not None
        assert process.stderr is not None
        return process.stdout.read(), process.stderr.read()
