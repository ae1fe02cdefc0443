"""The flag --minutes of the commands that train a run or say what it will do."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --minutes, which is the key `training.minutes`."""
    parser.add_argument(
        "--minutes",
        dest="config.training.minutes",
        type=float,
        metavar="M",
        help="minutes that a run takes with its verdict: as many steps as fit are trained",
    )
