"""Training in several processes, with the methods of a single trainer.

`mlx.launch` starts the ranks and ends the others when one is lost. They send messages on standard
output and read "stop" from standard input. This process trains nothing, and no rank outlives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import TrainingProcessLost, TrainingStopped, go_on_with
from nested_core.optim.tier_counters import TierStats
from nested_core.pipeline.processes import Processes
from nested_core.process.child import rebuild_error
from nested_core.process.command_parent import list_earlier_ends
from nested_core.records.plan import note_ends
from nested_core.rooms.ranks.gate_helpers import helping_to_judge
from nested_core.rooms.ranks.mlx_launch import (
    MESSAGE_PREFIX,
    count_ranks,
    launch_arguments,
    list_rank_hosts,
    rank_environment,
)
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.foreign_text import escape
from nested_core.training.memory_plan import MemoryPlan
from nested_core.training.reports.training_callback import TrainingCallback

LAUNCHER_PROGRAM = Path(__file__).with_name("launcher_program.py")
LAUNCHER_COMMAND = (sys.executable, "-P", str(LAUNCHER_PROGRAM))
WAITED_PATTERN = re.compile(r"rank \d+ waited too long: ")  # of launcher_program.py
LOST_RANK_PATTERN = re.compile(r"Node with rank (\d+) (exited with code (-?\d+)|was killed)")
EXIT_CODES_THROUGH_SSH = {
    "127": " (the shell's: no such program there; Python has the same path on each host)",
    "255": " (ssh's: it cannot reach or enter the host, or lost it, or the process was killed)",
}
COLOUR_CODE_PATTERN = re.compile(r"\x1b\[[0-9;]*m")
SECONDS_TO_END = 8.0  # after the first rank ends; then what is left is killed
MAX_KEPT_ERROR_LINES = 6  # of standard error, for the message about a lost rank


class RankGroup:
    """The ranks of one training, which has a trainer's methods.

    Attributes:
        ranks: the number of processes.
        steps, current_step: as the main rank last reported them.
        memory: the main rank's memory plan, known when `on_start` is called.
        has_waited: whether a rank ended because it had waited too long for the others.
        stop_requested: whether they were to stop.
    """

    memory: MemoryPlan

    def __init__(
        self, ranks: int, callback: TrainingCallback | None = None, hosts: Sequence[str] = ()
    ) -> None:
        """Create a group that is not started.

        hosts: the machine of each rank; empty if all are on this one.
        """
        self.ranks = ranks
        self._hosts = hosts
        self.steps = 1
        self.current_step = 0
        self.stop_requested = False
        self._callback = callback
        self._tiers: list[TierStats] = []
        self._killer_lock = threading.Lock()  # both readers of lines start the killer

    def tier_stats(self) -> list[TierStats]:
        """Return what each tier held when training began."""
        return self._tiers

    def stop_training(self) -> None:
        """Request a graceful stop: all ranks end the same step, the main one saves a checkpoint."""
        self.stop_requested = True
        with contextlib.suppress(BrokenPipeError):
            if self._stop_pipe is not None:
                os.write(self._stop_pipe, b"stop\n")

    def run(
        self, arguments: list[str], env: dict[str, str], on_start: Callable[[Any], None] | None
    ) -> None:
        """Start the ranks, and handle their messages until they end.

        Whatever this raises, no process of the ranks is left.

        arguments, env: of mlx.launch.
        on_start: called with this group when the main rank says that it begins.
        """
        self.has_waited = False
        self._end_messages: dict[int, dict[str, Any]] = {}
        self._lost_rank: str | None = None
        self._last_lines: deque[str] = deque(maxlen=MAX_KEPT_ERROR_LINES)
        process = subprocess.Popen(
            [*LAUNCHER_COMMAND, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018
        self._stop_pipe: int | None = process.stdin.fileno()
        self._killer = threading.Timer(SECONDS_TO_END, _kill_group, [process])
        self._killer.daemon = True
        reader = threading.Thread(target=self._show_errors, args=(process.stderr,), daemon=True)
        reader.start()
        try:
            for line in process.stdout:
                self._receive_line(line, on_start)
            reader.join(SECONDS_TO_END)
        finally:
            self._stop_pipe = None
            self._killer.cancel()
            _kill_group(process)
            with process:
                pass

    def _receive_line(self, line: str, on_start: Callable[[Any], None] | None) -> None:
        """Handle one line of the ranks' standard output; a line that is no message is shown."""
        _, prefix, text = line.rpartition(MESSAGE_PREFIX)
        if not prefix:
            self._note_line(line)
            return
        message = json.loads(text)
        message_type = message.pop("type")
        if message_type == "begun":
            self.steps = message["steps"]
            self.current_step = message["step"]
            self._tiers = [TierStats(**tier) for tier in message["tiers"]]
            self.memory = MemoryPlan(*message["memory"])
            if on_start is not None:
                on_start(self)
        elif message_type == "end":
            self._end_messages[message["rank"]] = message
            error = message["error"]
            ended_well = error is None or error["type"] == TrainingStopped.__name__
            if not ended_well or len(self._end_messages) == self.ranks:
                self._kill_after_grace_period()  # else the others may still be writing
        else:
            self._report_to_callback(message_type, message["info"])

    def _report_to_callback(self, message_type: str, info: dict[str, Any]) -> None:
        self.current_step = info.get("step", self.current_step)
        if self._callback is None:
            return
        if message_type == "train":
            self._callback.on_train_loss_report(info)
        else:
            self._callback.on_val_loss_report(info)

    def _show_errors(self, lines: Any) -> None:
        """Show what the ranks and mlx.launch write to standard error."""
        for line in lines:
            self._note_line(line)

    def _note_line(self, line: str) -> None:
        """Show a line that is no message, and keep it as one of the last."""
        plain = COLOUR_CODE_PATTERN.sub("", line)
        self._last_lines.append(plain.strip())
        self.has_waited = self.has_waited or WAITED_PATTERN.match(plain) is not None
        lost = LOST_RANK_PATTERN.search(plain)
        if lost and self._lost_rank is None:
            through_ssh = EXIT_CODES_THROUGH_SSH.get(lost[3], "") if self._hosts else ""
            self._lost_rank = f"{self._name_rank(int(lost[1]))} {lost[2]}{through_ssh}"
            self._kill_after_grace_period()
        sys.stderr.write(escape(plain.removesuffix("\n")) + "\n")  # it may hold text of others
        sys.stderr.flush()

    def _name_rank(self, rank: int) -> str:
        where = f" on {self._hosts[rank]}" if self._hosts else ""
        return f"Rank {rank} of {self.ranks}{where}"

    def _kill_after_grace_period(self) -> None:
        with self._killer_lock, contextlib.suppress(RuntimeError):  # it has been started already
            self._killer.start()

    def raise_if_unfinished(self, run_dir: Path) -> None:
        """Raise the error that a rank ended with, or TrainingProcessLost if it ended without one.

        Of several errors, one that says what was wrong goes before the TrainingProcessLost of the
        others.
        """
        ends = [end for _, end in sorted(self._end_messages.items())]
        errors = [self._message_to_error(end) for end in ends if end["error"]]
        for error in errors:
            if not isinstance(error, TrainingProcessLost):
                raise error
        if not errors and self._lost_rank is None and len(ends) == self.ranks:
            return
        what = self._lost_rank or "A rank ended"
        last_lines = "\n".join([*map(str, errors), *self._last_lines][:MAX_KEPT_ERROR_LINES])
        raise TrainingProcessLost(
            f"{what} at step {self.current_step} or after it, before training was done; the others "
            f"were ended with it. The last lines that were printed:\n{last_lines}\n",
            advice=go_on_with(run_dir),
        )

    def _message_to_error(self, message: dict[str, Any]) -> Exception:
        """Return the error that a rank ended with, of the class that it had there."""
        described, name = message["error"], self._name_rank(message["rank"])
        if self._hosts:  # what it says of files is so on that host
            described = described | {"message": f"{name}: {described['message']}"}
        text = f"{name}: {described['type']}: {described['text']}"
        return rebuild_error(described) or TrainingProcessLost(text)


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kill the process group of a process that was not waited for yet: its id is still its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)


def train_in_ranks(
    config: FineTuneConfig,
    run: RunDirectory,
    ranks: int,
    callback: TrainingCallback | None = None,
    on_start: Callable[[Any], None] | None = None,
) -> None:
    """Train in `ranks` processes until result.json is written.

    If they wait for each other for too long, they are ended and started once more, from the last
    checkpoint, if `training.restarts` allows it.

    callback: receives the reports of the main rank.
    on_start: called with the group before its first step, at each start.

    Raises TrainingProcessLost if a process was lost, or what a rank's trainer raised.
    """
    group = RankGroup(ranks, callback, list_rank_hosts(config))
    mx.clear_cache()  # frees the device's memory for the ranks
    group.run(launch_arguments(config, ranks, run.path), rank_environment(config), on_start)
    if group.has_waited and not group.stop_requested and config.training.restarts > 0:
        warnings.warn(f"{_describe_wait(config, group)} They go on by themselves.", stacklevel=2)
        note_ends(run.plan, (*list_earlier_ends(), "hang_timeout"))
        group.run(launch_arguments(config, ranks, run.path), rank_environment(config), on_start)
    if group.has_waited:
        raise TrainingProcessLost(_describe_wait(config, group), advice=go_on_with(run.path))
    group.raise_if_unfinished(run.path)


def _describe_wait(config: FineTuneConfig, group: RankGroup) -> str:
    """Report that the ranks waited for each other, and where to look."""
    return (
        f"No rank of {group.ranks} took a step for as long as training.hang_timeout "
        f"({config.training.hang_timeout}) allows, at step {group.current_step} or after it, and "
        f"all were ended. Their stacks are above. Look at the rank that does something else than "
        f"wait for a sum over the ranks, or that printed nothing: its machine, its device, its "
        f"disk and its network."
    )


RANKS = Processes(count_ranks, train_in_ranks, helping_to_judge)
