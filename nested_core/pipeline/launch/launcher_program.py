"""Run `mlx.launch` without its busy loop: `python launcher_program.py MLX_LAUNCH ARGUMENTS`.

For each rank, mlx.launch waits until there is output to read or until the rank's standard input
can be written to (mlx 0.32.4, `_launch_with_io` in mlx/_distributed_utils/launch.py). The second is
always true, so it keeps one core busy for as long as the ranks train. Here it waits for output.

Started by its path; it imports nothing of ours.
"""

from __future__ import annotations

import runpy
import select
import sys
from typing import Any

from mlx._distributed_utils import launch

MAX_WAIT_SECONDS = 0.1  # between two times that input for the ranks is passed on


def select_waiting_for_output_only(
    readable: list[int], writable: list[int], exceptional: list[int], timeout: float
) -> tuple[list[Any], list[Any], list[Any]]:
    """`select.select`, but only output ends the wait; it is at most MAX_WAIT_SECONDS long."""
    with_output, _, _ = select.select(readable, [], [], min(timeout, MAX_WAIT_SECONDS))
    _, accepting_input, _ = select.select([], writable, exceptional, 0)
    return with_output, accepting_input, []


if __name__ == "__main__":
    module: Any = launch
    module.select = select_waiting_for_output_only
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
