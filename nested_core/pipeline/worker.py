"""One rank: `python -m nested_core.pipeline.worker RUN_DIR RANKS`, as mlx.launch starts it.

It reads the configuration from the run directory, hears "stop" on standard input, and ends where
that does. It locks nothing: whoever started the ranks holds the locks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nested_core.errors import NestedTuneError, TrainingStopped
from nested_core.pipeline.launch.hosts import own_device, own_temporary_folder
from nested_core.pipeline.launch.launcher import MARK


def main(run_dir: str, ranks: str) -> int:
    """Train as one of the ranks; return what the process exits with.

    A stop is 0 as well: mlx.launch ends the others where one exits with anything else, and the
    leading rank may still be writing.
    """
    rank = int(os.environ["MLX_RANK"])
    device = own_device(os.environ, rank)
    if device is not None:  # before CUDA is first used
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        if rank:
            _be_quiet()
            os.environ["TMPDIR"] = str(own_temporary_folder(rank))
        with contextlib.redirect_stdout(sys.stderr):
            _train(Path(run_dir), int(ranks))
    except TrainingStopped as error:
        return _end(rank, error, 0)
    except BaseException as error:
        if not isinstance(error, NestedTuneError):
            traceback.print_exc()
        return _end(rank, error, 1)
    return _end(rank, None, 0)


def _train(run_dir: Path, ranks: int) -> None:
    from nested_core.models.base_model import find_base
    from nested_core.pipeline import steps
    from nested_core.storage.run_directory import RunDirectory
    from nested_core.training.distributed import join

    listener = Listener()
    listener.start()
    run = RunDirectory(run_dir)
    config = steps.read_run_config(run)
    find_base(config)  # before anything is computed
    world = join(ranks)
    steps.train_as_rank(config, run, world, Reports(), listener.watch)


def _be_quiet() -> None:
    """What all ranks would say, the leading one says."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)


def _end(rank: int, error: BaseException | None, code: int) -> int:
    name = None if error is None else type(error).__name__
    number = error.errno if isinstance(error, OSError) else None
    tell("end", rank=rank, error=name, message=str(error), errno=number)
    return code


def tell(kind: str, **values: Any) -> None:
    """Say one thing to whoever started the ranks, in one write."""
    os.write(1, f"{MARK}{json.dumps({'is': kind} | values)}\n".encode())


class Reports:
    """Sends on what a trainer reports."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Send a training report."""
        tell("train", info=train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Send an evaluation."""
        tell("val", info=val_info)


class Listener(threading.Thread):
    """Hears "stop" on standard input, and ends the process where nobody is left to say it."""

    def __init__(self) -> None:
        super().__init__(name="listener", daemon=True)
        self._trainer: Any = None
        self._is_asked = False

    def watch(self, trainer: Any) -> None:
        """Stop this trainer when asked, and say that it begins."""
        self._trainer = trainer
        if self._is_asked:
            trainer.stop_training()
        if trainer.world.is_main:
            tiers = [asdict(stats) for stats in trainer.tier_stats()]
            memory, step = asdict(trainer.memory), trainer.current_step
            tell("begun", step=step, steps=trainer.steps, tiers=tiers, memory=memory)

    def run(self) -> None:
        """Listen until the other end is closed."""
        while os.read(0, 4096):  # "stop" is the only word
            self._is_asked = True
            if self._trainer is not None:
                self._trainer.stop_training()
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
