"""A process that makes one model, or takes runs of one side at one size and appends their rows.

Arguments: the models' folder, a size, the file of rows, then runs as JSON lists; without a run the
model is made. mlx_lm's runs have a process in which nothing of ours prepares MLX's backend.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.time_to_loss.arms import RIVAL, arm_of
from benchmarks.time_to_loss.models import SIZES, load_with_lora, pretrain
from benchmarks.time_to_loss.rows import TUNING_SEED, Run

WINDOW = 16  # steps between two looks: every set of due tiers of [1, 4, 16] is in it
LONGER = 1.5  # ours are measured beyond the rival's last step: cheap steps may buy more of them


def main(models: str, size: str, rows: str, *runs: str) -> None:
    """Do what the arguments say."""
    folder, todo = Path(models) / size, [Run(*json.loads(run)) for run in runs]
    if all(run.arm != RIVAL for run in todo):
        from nested_core.backend import prepare, prepare_for_model_size
        from nested_core.models.base_model import estimate_weight_count

        prepare()
        prepare_for_model_size(estimate_weight_count(folder))
    if not todo:
        pretrain(folder, SIZES[size])
        return
    from benchmarks.time_to_loss.judge import Judge

    judge = Judge(folder)
    for run in todo:
        row = take(run, folder, judge)
        with Path(rows).open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        gc.collect()


def steps_of(run: Run) -> int:
    """How many steps a run takes, a whole number of windows."""
    goes_on = run.arm != RIVAL and run.seed != TUNING_SEED
    return round(SIZES[run.size].steps * (LONGER if goes_on else 1) / WINDOW) * WINDOW


def take(run: Run, folder: Path, judge: Any) -> dict[str, Any]:
    """Train once; the row holds a loss before the first step and one after every window."""
    import mlx.core as mx

    began, windows, looks = time.perf_counter(), list[float](), [judge.look({})]

    def look(seconds: float, params: Mapping[str, mx.array]) -> None:
        windows.append(round(seconds, 6))
        looks.append(judge.look(params))

    model, steps = load_with_lora(folder, run.seed), steps_of(run)
    sizes = {"steps": steps, "batch": SIZES[run.size].batch, "window": WINDOW}
    settings: dict[str, Any] = sizes | {"seed": run.seed, "rate": run.rate, "look": look}
    if run.arm == RIVAL:
        from benchmarks.time_to_loss.rival import train_rival

        train_rival(model, **settings)
    else:
        from benchmarks.time_to_loss.ours import train_ours

        train_ours(model, arm_of(run.arm), **settings)
    return vars(run) | {
        "base": judge.base,
        "steps": list(range(0, steps + 1, WINDOW)),
        "losses": [round(loss, 6) if math.isfinite(loss) else None for loss, _ in looks],
        "right": [round(share, 4) for _, share in looks],
        "windows": windows,
        "took": round(time.perf_counter() - began, 2),
        "device": mx.device_info().get("device_name", str(mx.default_device())),
        "mlx": importlib.metadata.version("mlx"),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
