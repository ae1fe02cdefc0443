"""Run `mlx.launch` with four changes: `python launcher_program.py ARGUMENTS`.

For each rank, mlx.launch waits until there is output to read or until the rank's standard input
can be written to (mlx 0.32.4, `_launch_with_io` in mlx/_distributed_utils/launch.py). The second is
always true, so it keeps one core busy for as long as the ranks train. Here it waits for output.

Where a rank prints its stacks because it waited too long (rank_world.py), they are marked
with its number, and the others are given time to print theirs before they are ended. From another
host, stacks come on standard output: ssh gives a rank one terminal for both.

That terminal ends lines with a carriage return, which mlx.launch takes for the end of the name of
the file with the rank's process id. Without it the rank on the other host is found and ended.

When standard input ends, the parent is gone, which mlx.launch does not notice. Here its process
group is killed.

Started by its path, in a session of its own; it imports nothing of ours.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import threading
from contextlib import suppress
from typing import Any

from mlx._distributed_utils import launch

MAX_WAIT_SECONDS = 0.1  # between two times that input for the ranks is passed on
SECONDS_FOR_STACKS = 2.0
STACK_PATTERN = re.compile(r"^(?:Current thread|Thread) 0x", re.MULTILINE)  # as faulthandler prints


def select_waiting_for_output_only(
    readable: list[int], writable: list[int], exceptional: list[int], timeout: float
) -> tuple[list[Any], list[Any], list[Any]]:
    """Run `select.select`, but only output ends the wait; at most MAX_WAIT_SECONDS long."""
    with_output, _, _ = select.select(readable, [], [], min(timeout, MAX_WAIT_SECONDS))
    _, accepting_input, _ = select.select([], writable, exceptional, 0)
    return with_output, accepting_input, []


class RankProcess(launch.RemoteProcess):
    """A rank, whose stacks are marked with its number, and which may print them at its end."""

    has_any_waited = False

    def __init__(self, rank: int, *arguments: Any) -> None:
        super().__init__(rank, *arguments)
        self._mark = f"rank {rank} waited too long: "

    def preprocess_output(self, data: str, is_stdout: bool = False) -> str:
        """Return the part of its output that is shown."""
        shown = str(super().preprocess_output(data, is_stdout))
        self._pidfile = str(self._pidfile).strip()
        if (is_stdout and self._is_local) or "Fatal Python error" in shown:
            return shown
        marked = STACK_PATTERN.sub(lambda found: self._mark + found[0], shown)
        RankProcess.has_any_waited |= marked != shown
        return marked

    def terminate(self) -> None:
        """End it; a stopped one has to go on for its stacks, at the alarm that it has missed."""
        if RankProcess.has_any_waited:
            self.process.send_signal(signal.SIGCONT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(SECONDS_FOR_STACKS)
        with suppress(subprocess.CalledProcessError):  # its host cannot be reached
            super().terminate()


def pass_on_input_until_parent_ends(source: int, target: int) -> None:
    """Copy one pipe to another; kill this process group when the first one ends."""
    while words := os.read(source, 4096):
        os.write(target, words)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    module: Any = launch
    module.RemoteProcess = RankProcess
    module.select = select_waiting_for_output_only
    parent_input = os.dup(0)
    launch_input, copied_input = os.pipe()
    os.dup2(launch_input, 0)
    pipes = (parent_input, copied_input)
    threading.Thread(target=pass_on_input_until_parent_ends, args=pipes, daemon=True).start()
    launch.main()
