"""What the core plans of memory, without the room that forecasts a peak."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from nested_core.training.trainer import Trainer
from tests.example import example_config, prepare, train
from tests.left_out import leave_out_room


@pytest.mark.parametrize(("recomputes", "recomputed"), [(False, 0), (True, 6)])
def test_without_the_room_no_peak_is_forecast_and_all_layers_are_recomputed_or_none(
    recomputes: bool, recomputed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    planned = []

    def look(trainer: Trainer) -> None:
        planned.append(trainer.memory)
        assert len(trainer.memory.layers_to_recompute(trainer.model)) == recomputed

    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    leave_out_room("memory", monkeypatch)
    config = example_config(
        grad_checkpoint=recomputes, clear_cache_threshold=10**9, iters=4, val_batches=0
    )
    train(config, prepare(config, tmp_path / "run"), on_start=look)
    (plan,) = planned
    assert plan.fits
    assert plan.needed is None
    assert plan.describe() == f"memory: {plan.capacity / 1e9:.1f} GB"
    assert limits == [10**9]
