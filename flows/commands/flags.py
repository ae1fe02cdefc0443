"""Every flag of `mlx_lm.lora`, with the same name and meaning, and the run's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nested_core.config.loading import load_config
from nested_core.config.schema import FineTuneConfig

TEXT = ("model", "data", "resume_adapter_file", "adapter_path", "report_to", "project_name")
NUMBERS = (
    *("num_layers", "batch_size", "iters", "val_batches", "steps_per_report", "steps_per_eval"),
    *("grad_accumulation_steps", "save_every", "test_batches", "max_seq_length", "seed"),
)
SWITCHES = ("train", "mask_prompt", "test", "grad_checkpoint", "trust_remote_code")
CHOICES = {
    "fine_tune_type": ("lora", "dora", "full"),
    "optimizer": ("adam", "adamw", "muon", "sgd", "adafactor"),
}


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add -c/--config and the flags that win over it."""
    parser.add_argument(
        "-c", "--config", type=Path, help="a YAML configuration, as for mlx_lm.lora"
    )
    group = parser.add_argument_group("as in mlx_lm.lora; a flag wins over the file")
    for name in TEXT:
        group.add_argument(_flag(name), metavar="TEXT")
    for name in NUMBERS:
        group.add_argument(_flag(name), type=int, metavar="N")
    for name in SWITCHES:
        group.add_argument(_flag(name), action="store_true", default=None)
    for name, choices in CHOICES.items():
        group.add_argument(_flag(name), choices=choices)
    group.add_argument("--learning-rate", type=float, metavar="RATE")
    group.add_argument("--clear-cache-threshold", type=_parse_size, metavar="SIZE")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add where the run is kept and whether to go on with it."""
    parser.add_argument("--run-dir", type=Path, help="default: runs/<UTC time>-<8 hex digits>")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")


def config_from(arguments: argparse.Namespace) -> FineTuneConfig:
    """The configuration of a command line: flag, then YAML, then default."""
    names = (*TEXT, *NUMBERS, *SWITCHES, *CHOICES, "learning_rate", "clear_cache_threshold")
    flags: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in flags.items() if value is not None}
    return load_config(arguments.config, given)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parse_size(text: str) -> int:
    from mlx_lm.utils import _parse_size as parse

    return int(parse(text))
