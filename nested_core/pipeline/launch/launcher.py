"""Training in several processes, seen from the one that started them: as if it were one trainer.

`mlx.launch` starts them and ends the others when one is lost; they answer on standard output, and
hear on standard input. Nothing is trained here, and no process outlives this one.
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
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import mlx.core as mx

from nested_core import errors
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import NestedTuneError, RankLost, TrainingStopped
from nested_core.optim.clock import TierStats
from nested_core.pipeline.launch import watchdog
from nested_core.pipeline.launch.hosts import launch_command, rank_environment
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.callbacks import TrainingCallback
from nested_core.training.memory.plan import MemoryPlan

MARK = "@nested-tune "  # before what a rank says, among all else that is printed
LOST = re.compile(r"Node with rank (\d+) (exited with code -?\d+|was killed)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
SECONDS_TO_END = 8.0  # until what is left of the ranks is killed
LINES_KEPT = 6


class RankGroup:
    """The ranks of one training; it answers as a trainer does, from what the leading rank says."""

    def __init__(self, ranks: int, callback: TrainingCallback | None = None) -> None:
        self.ranks, self.steps = ranks, 1
        self.current_step, self.current_train_loss, self.gradient_bytes = 0, None, 0
        self._callback = callback
        self._tiers: list[TierStats] = []
        self.memory: MemoryPlan  # known when on_start is called
        self._ends: dict[int, dict[str, Any]] = {}
        self._lost: str | None = None
        self._words: int | None = None
        self._last_lines: deque[str] = deque(maxlen=LINES_KEPT)

    def tier_stats(self) -> list[TierStats]:
        """What each tier held when training began."""
        return self._tiers

    def stop_training(self) -> None:
        """Ask for a graceful stop: every rank ends the same step, and one writes a checkpoint."""
        with contextlib.suppress(BrokenPipeError):
            if self._words is not None:
                os.write(self._words, b"stop\n")

    def run(
        self,
        command: list[str],
        environment: dict[str, str],
        on_start: Callable[[Any], None] | None,
    ) -> None:
        """Start the ranks and follow them to their end; none is left, however this ends."""
        process = subprocess.Popen(
            [sys.executable, "-P", watchdog.__file__, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._words = _opened(process.stdin).fileno()
        self._killer = threading.Timer(SECONDS_TO_END, _kill, [process])
        self._killer.daemon = True
        others = threading.Thread(target=self._pass_on, args=(process.stderr,), daemon=True)
        others.start()
        try:
            for line in _opened(process.stdout):
                self._hear(line, on_start)
            others.join(SECONDS_TO_END)
        finally:
            self._words = None
            self._killer.cancel()
            _kill(process)
            with process:
                pass

    def _hear(self, line: str, on_start: Callable[[Any], None] | None) -> None:
        """Take in what a rank says; what is no word of ours is shown."""
        before, mark, word = line.rpartition(MARK)
        if not mark:
            print(line, end="", file=sys.stderr)
            return
        said = json.loads(word)
        kind = said.pop("is")
        if kind == "begun":
            self.steps, self.current_step = said["steps"], said["step"]
            self._tiers = [TierStats(**tier) for tier in said["tiers"]]
            self.memory = MemoryPlan(**said["memory"])
            if on_start is not None:
                on_start(self)
        elif kind == "end":
            self._ends[said["rank"]] = said
            is_done = said["error"] in (None, TrainingStopped.__name__)  # the others may yet write
            if not is_done or len(self._ends) == self.ranks:
                self._end_soon()
        else:
            self._report(kind, said["info"])

    def _report(self, kind: str, info: dict[str, Any]) -> None:
        self.current_step = info.get("step", self.current_step)
        self.current_train_loss = info.get("train_loss", self.current_train_loss)
        self.gradient_bytes += info.get("gradient_bytes", 0)
        if self._callback is None:
            return
        if kind == "train":
            self._callback.on_train_loss_report(info)
        else:
            self._callback.on_val_loss_report(info)

    def _pass_on(self, lines: Any) -> None:
        """Show what the ranks and mlx.launch write to standard error, and keep the end of it."""
        for line in lines:
            plain = COLOUR.sub("", line)
            self._last_lines.append(plain.strip())
            if self._lost is None and (lost := LOST.search(plain)):
                self._lost = f"Rank {lost[1]} of {self.ranks} {lost[2]}"
                self._end_soon()
            print(plain, end="", file=sys.stderr)

    def _end_soon(self) -> None:
        with contextlib.suppress(RuntimeError):  # it runs already
            self._killer.start()

    def raise_if_unfinished(self, run_dir: Path) -> None:
        """Raise what a rank raised, what was wrong rather than what followed; else RankLost."""
        raised = [said for _, said in sorted(self._ends.items()) if said["error"]]
        causes = sorted(map(_as_error, raised), key=lambda error: isinstance(error, RankLost))
        if causes and not isinstance(causes[0], RankLost):
            raise causes[0]
        if not raised and self._lost is None and len(self._ends) == self.ranks:
            return
        what = self._lost or "A rank ended"
        said = "\n".join([*map(str, causes), *self._last_lines][:LINES_KEPT])
        raise RankLost(
            f"{what} at step {self.current_step} or after it, before training was done; the others "
            f"were ended with it. Go on from the last checkpoint with the same command, --run-dir "
            f"{run_dir} --resume. The last that was said:\n{said}"
        )


def _opened(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RankLost("A process was started without a pipe.")
    return stream


def _kill(process: subprocess.Popen[str]) -> None:
    """End the group of a process that has not been waited for yet: its id is still its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)


def _as_error(said: dict[str, Any]) -> Exception:
    """The error that a rank ended with, of the class that it had."""
    kind = getattr(errors, said["error"], None)
    if isinstance(kind, type) and issubclass(kind, NestedTuneError):
        return kind(said["message"])
    if said["errno"] is not None:
        return OSError(said["errno"], f"rank {said['rank']}: {said['message']}")
    if said["error"] == "MemoryError":
        return MemoryError(f"rank {said['rank']}: {said['message']}")
    return RankLost(f"rank {said['rank']}: {said['error']}: {said['message']}")


def train_in_ranks(
    config: FineTuneConfig,
    run: RunDirectory,
    ranks: int,
    callback: TrainingCallback | None = None,
    on_start: Callable[[Any], None] | None = None,
) -> None:
    """Train in so many processes until result.json is written.

    `on_start` is handed the group when its first step begins. Raises RankLost where a process
    ended before its time, and else what a trainer raises.
    """
    group = RankGroup(ranks, callback)
    mx.clear_cache()  # what loading left on the device is the ranks' to use
    group.run(launch_command(config, ranks, run.path), rank_environment(config), on_start)
    group.raise_if_unfinished(run.path)
    print(
        f"{ranks} ranks, equal to the bit; each gave {group.gradient_bytes:,} bytes of gradients, "
        f"those of the due tiers, to be summed",
        file=sys.stderr,
    )
