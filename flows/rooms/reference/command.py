"""train --log mlx_lm: the lines of mlx_lm.lora in place of ours."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from flows.terminal.run_follower import TrainingLog

if TYPE_CHECKING:
    from flows.rooms.reference.mlx_lm_log import MlxLmLog
    from nested_core.config.schema import FineTuneConfig
    from nested_core.storage.run_directory import RunDirectory


def add_flags(train: argparse.ArgumentParser) -> None:
    """Add --log to train."""
    train.add_argument(
        "--log",
        choices=("auto", "mlx_lm"),
        default="auto",
        help="auto: a live view, or lines where there is no terminal; mlx_lm: the lines of "
        "mlx_lm.lora on standard output, on standard error with --json",
    )


def find_log(
    arguments: argparse.Namespace, config: FineTuneConfig, run: RunDirectory
) -> MlxLmLog | None:
    """What prints the lines of mlx_lm.lora, where they are asked for."""
    if arguments.log != "mlx_lm":
        return None
    from flows.rooms.reference.mlx_lm_log import MlxLmLog

    return MlxLmLog(config, run, sys.stderr if arguments.json else sys.__stdout__ or sys.stderr)


LOG = TrainingLog(find_log)
