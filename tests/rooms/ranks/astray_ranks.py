"""A run of two ranks, one of which goes astray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.rooms.ranks import mlx_launch
from tests.example import example_config

PROGRAM = Path(__file__).with_name("astray.py")


def go_astray(monkeypatch: pytest.MonkeyPatch, how: str, **changes: Any) -> FineTuneConfig:
    """Have rank 1 do what astray.py describes."""
    monkeypatch.setattr(mlx_launch, "RANK_WORKER_ARGUMENTS", (str(PROGRAM),))
    monkeypatch.setenv("ASTRAY", how)
    training = {"processes": 2, "max_grad_norm": 1.0} | changes.pop("training", {})
    settings = {"batch_size": 4, "save_every": 2, "steps_per_report": 2, "val_batches": 0}
    return example_config(**settings | changes, training=training)
