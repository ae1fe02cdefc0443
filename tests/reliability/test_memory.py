"""2,000 steps at one batch shape: process and MLX hold no more at the end than early on."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.example import example_config, prepare, train

STEPS_BEFORE_FLAT = 50
PAGE_BYTES = resource.getpagesize()


class MemoryLog:
    """Resident and MLX memory in bytes, at every report."""

    def __init__(self) -> None:
        self.resident: list[int] = []
        self.active: list[int] = []
        self.peak: list[int] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Note what is held now."""
        statm = Path("/proc/self/statm")
        if statm.exists():
            self.resident.append(int(statm.read_text().split()[1]) * PAGE_BYTES)
        self.active.append(mx.get_active_memory())
        self.peak.append(mx.get_peak_memory())

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Nothing: the reports are enough."""


@pytest.mark.reliability
@pytest.mark.timeout(900)
def test_memory_is_flat_over_2000_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = example_config(
        iters=2000, steps_per_report=STEPS_BEFORE_FLAT, steps_per_eval=2000, save_every=1000
    )
    log = MemoryLog()
    train(config, prepare(config, tmp_path / "run"), log)
    with capsys.disabled():
        for name in ("resident", "active", "peak"):
            values = getattr(log, name)
            print(f"\n{name}: {values[0] / 1e6:.1f} MB after 50 steps, {values[-1] / 1e6:.1f} MB")
    # A report finds one more or one less step in flight: of that, windows are compared.
    assert max(log.active[-10:]) <= max(log.active[:10]) * 1.02
    assert log.peak[-1] <= log.peak[0] * 1.02
    assert max(log.resident[-10:], default=0) <= max(log.resident[:1], default=0) * 1.02
