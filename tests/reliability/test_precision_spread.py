"""The loss of bfloat16 runs against float32 runs: no further off than one seed is from another."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tests.example import train_example

SEEDS = range(5)
STEPS, REPORT = 60, 10


def losses(folder: Path, precision: str) -> np.ndarray:
    """Training losses, (seeds, reports), and the last validation loss in the last column."""
    curves = []
    for seed in SEEDS:
        done = train_example(
            folder / f"{precision}-{seed}",
            iters=STEPS,
            steps_per_report=REPORT,
            steps_per_eval=STEPS,
            batch_size=4,
            seed=seed,
            training={"precision": precision},
        )
        records = done.metrics()
        curve = [record["loss"] for record in records if record.get("loss") is not None]
        validation = [record["val_loss"] for record in records if record.get("val_loss")]
        curves.append([*curve, validation[-1]])
    return np.array(curves)


@pytest.mark.reliability
def test_the_curve_of_bfloat16_stays_within_the_spread_of_seeds_of_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact, rounded = losses(tmp_path, "float32"), losses(tmp_path, "bfloat16")
    assert exact.shape == rounded.shape == (len(SEEDS), STEPS // REPORT + 1)
    pairs = list(combinations(range(len(SEEDS)), 2))
    between = np.mean([np.abs(exact[a] - exact[b]) for a, b in pairs], axis=0)
    apart = np.abs(rounded - exact).mean(axis=0)
    with capsys.disabled():
        print(f"\nfloat32, one seed from another: {between.round(3).tolist()}")
        print(f"bfloat16 from float32, a seed:  {apart.round(3).tolist()}")
    assert (apart > 0).any(), "nothing was computed in bfloat16"
    assert (exact.min(axis=0) <= rounded.mean(axis=0)).all()
    assert (rounded.mean(axis=0) <= exact.max(axis=0)).all()
    assert apart.mean() <= between.mean()
