"""One of several training processes: `python -m nested_core.rooms.ranks.rank_worker RUN_DIR RANKS`.

`mlx.launch` starts it. It reads the configuration from the run directory and "stop" from standard
input, ends when standard input ends, and sends JSON messages on standard output. It takes no lock:
the process that started the ranks holds them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nested_core import backend
from nested_core.config.resume import read_run_config
from nested_core.errors import NestedTuneError, TrainingStopped
from nested_core.process.child_main import describe_error
from nested_core.rooms.ranks.mlx_launch import MESSAGE_PREFIX, rank_device


def main(run_dir: str, ranks: str) -> int:
    """Train as one of the ranks; return the exit code: 0, or 1 for an error.

    A requested stop gives 0 too: on any other code mlx.launch ends the other ranks, and the main
    one may still be writing. At the alarm of rank_world.py this process prints its stacks and ends.
    """
    faulthandler.register(signal.SIGALRM, chain=True)
    backend.prepare()
    backend.hide_torch_from_transformers()
    rank = int(os.environ["MLX_RANK"])
    device = rank_device(os.environ, rank)
    if device is not None:  # before CUDA is first used
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    described, code = None, 0
    try:
        if rank > 0:
            # Warnings and log lines are the same in all ranks, and the main one has them
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
        with contextlib.redirect_stdout(sys.stderr):
            _train_as_rank(Path(run_dir), int(ranks))
    except BaseException as error:
        if not isinstance(error, NestedTuneError):
            traceback.print_exc()
        described, code = describe_error(error), int(not isinstance(error, TrainingStopped))
    send_message("end", rank=rank, error=described)
    return code


def _train_as_rank(run_dir: Path, ranks: int) -> None:
    """Join the other ranks, and train the run of this directory to its end."""
    from nested_core.models.base_model import prepare_for_base_model
    from nested_core.pipeline import steps
    from nested_core.rooms.ranks.rank_world import HangWatch, join_ranks
    from nested_core.storage.run_directory import RunDirectory

    listener = StopListener()
    listener.start()
    run = RunDirectory(run_dir)
    run.watch_parents_lock()
    config = read_run_config(run)
    prepare_for_base_model(config)  # before anything is computed
    world = join_ranks(ranks, HangWatch(config.training.hang_timeout))
    steps.train_as_rank(config, run, world, ReportSender(), listener.watch)


def send_message(message_type: str, **values: Any) -> None:
    """Send one message to the process that started the ranks, in one write."""
    os.write(1, f"{MESSAGE_PREFIX}{json.dumps({'type': message_type} | values)}\n".encode())


class ReportSender:
    """A training callback that sends each report as a message."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Send a training report."""
        send_message("train", info=train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Send an evaluation."""
        send_message("val", info=val_info)


class StopListener(threading.Thread):
    """Reads "stop" from standard input; ends the process when the other end is gone."""

    def __init__(self) -> None:
        super().__init__(name="listener", daemon=True)
        self._trainer: Any = None
        self._stop_requested = False

    def watch(self, trainer: Any) -> None:
        """Have requests stop this trainer; on the main rank, send the message `begun`."""
        self._trainer = trainer
        if self._stop_requested:
            trainer.stop_training()
        if trainer.world.is_main:
            tiers = [asdict(stats) for stats in trainer.tier_stats()]
            plan = trainer.memory
            memory = (plan.needed, plan.capacity, plan.recomputed, plan.layers, plan.describe())
            begun = {"step": trainer.current_step, "steps": trainer.steps, "tiers": tiers}
            send_message("begun", **begun, memory=memory)

    def run(self) -> None:
        """Read until the other end is closed."""
        while os.read(0, 4096):  # "stop" is the only message
            self._stop_requested = True
            if self._trainer is not None:
                self._trainer.stop_training()
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
