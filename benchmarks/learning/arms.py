"""The trainings of the arms, each from a base and a data folder to an adapter's folder.

mlx_lm's are mlx_lm.lora's own `run` with its own defaults. Ours are what `nested-tune init` writes
and `nested-tune train` does, up to the adapter: the gate is left out, for mlx_lm.lora has none.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.learning.bases import GENERAL_NAME
from benchmarks.learning.judge import Judge
from benchmarks.learning.study import CHOOSING_SEED, OF_MLX_LM, RATES, Cell, Study
from benchmarks.learning.tasks import Counts, Splits, read_task

KEPT = 16  # judges and data sets in memory, of a task and a size each
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "c": {},
    "d": {},
    "e": {},
    "g-deep": {"nested": {"frequencies": [1, 2, 4], "fast": "deep"}},
    "g-shallow": {"nested": {"frequencies": [1, 2, 4], "fast": "shallow"}},
}


Training = Callable[[], Path]  # trains, and returns the adapter's folder


def run_cell(cell: Cell, study: Study, bases: Path, data: Path | None) -> dict[str, Any]:
    """Train once and judge the adapter; the row of the result.

    Seconds are of the training command's work, from loading the base to the adapter on disk;
    joules are the whole GPU's meanwhile, and mean something where it does nothing else. What
    `init` does is not timed.
    """
    base = bases / cell.size
    with tempfile.TemporaryDirectory() as scratch:
        splits = read_splits(cell.task, data, study.counts)
        splits.write(Path(scratch) / "data")
        if cell.arm in OF_MLX_LM:
            training = prepare_mlx_lm(cell, study.iterations[cell.task], base, Path(scratch))
        else:
            training = prepare_ours(cell, len(splits.train), base, Path(scratch))
        mx.clear_cache()
        mx.reset_peak_memory()
        joules, began = read_joules(), time.perf_counter()
        adapter = training()
        seconds = time.perf_counter() - began
        measured = {
            "seconds": round(seconds, 3),
            "joules": round(read_joules() - joules, 1),
            "peak_gb": round(mx.get_peak_memory() / 1e9, 4),
        }
        split = "choose" if cell.seed == CHOOSING_SEED else "judge"
        judged = read_judge(cell.task, base, data, study.counts, split).judge(adapter)
    mx.clear_cache()
    return (
        vars(cell)
        | measured
        | {
            "rows": len(judged.right),
            "right_share": round(float(judged.right.mean()), 6),
            "right": np.packbits(judged.right).tobytes().hex(),
            "loss": round(judged.loss, 6),
            "kl": round(judged.kl, 6),
            "general_loss": judged.general_loss and round(judged.general_loss, 6),
        }
    )


@lru_cache(KEPT)
def read_splits(task: str, data: Path | None, counts: Counts) -> Splits:
    """A task's rows."""
    return read_task(task, data, counts)


@lru_cache(KEPT)
def read_judge(task: str, base: Path, data: Path | None, counts: Counts, split: str) -> Judge:
    """What judges adapters of this base on this split of the task."""
    file = base / GENERAL_NAME
    general = json.loads(file.read_bytes()) if file.exists() else []
    return Judge(base, getattr(read_splits(task, data, counts), split), general)


def read_joules() -> float:
    """What the first NVIDIA GPU has used since its driver was loaded; 0 without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(device)) / 1000
    except Exception:  # of the import, the library or the driver: there is no such GPU
        return 0.0


def prepare_mlx_lm(cell: Cell, iterations: int, base: Path, folder: Path) -> Training:
    """`mlx_lm.lora --train` in this process: its defaults, and what the arm changes.

    Its default of 16 layers is refused for a model of fewer, which are all trained then.
    """
    from mlx_lm import lora

    layers = json.loads((base / "config.json").read_bytes())["num_hidden_layers"]
    changes: dict[str, Any] = {
        "num_layers": min(lora.CONFIG_DEFAULTS["num_layers"], layers) if cell.arm == "a" else -1,
        "mask_prompt": cell.arm == "h",
        "iters": iterations,
        "seed": cell.seed,
        "train": True,
        "model": str(base),
        "data": str(folder / "data"),
        "adapter_path": str(folder / "adapter"),
    }
    if cell.rate is not None:
        changes["learning_rate"] = cell.rate

    def training() -> Path:
        with contextlib.redirect_stdout(io.StringIO()):
            lora.run(SimpleNamespace(**lora.CONFIG_DEFAULTS | changes))
        return folder / "adapter"

    return training


def prepare_ours(cell: Cell, rows: int, base: Path, folder: Path) -> Training:
    """What `init` writes for this base and `rows` to train on, with the arm's changes, trained.

    A sweep has as many optimizer steps as the trainings of four rates, and judges its winner.
    """
    from nested_core.config.loading import parse_config, parse_yaml
    from nested_core.models.session import Session
    from nested_core.pipeline.hooks import Steps
    from nested_core.pipeline.suggested_config import suggest_config
    from nested_core.pipeline.sweep import SweepRequest, sweep
    from nested_core.storage.run_directory import open_run

    values = parse_yaml(suggest_config(str(base), str(folder / "data")).text)
    for section, keys in CHANGES[cell.arm].items():
        values[section] = values.get(section, {}) | keys
    values["seed"] = cell.seed
    if cell.rate is not None:
        values["learning_rate"] = cell.rate
    config = parse_config(values, source=f"arm {cell.arm}")
    if cell.arm == "e":
        one_run = config.training.epochs * math.ceil(rows / config.batch_size)
        request = SweepRequest({}, steps=int(len(RATES) * one_run))
        return lambda: sweep(config, folder / "sweep", request).run.adapter
    run, steps = open_run(folder / "run"), Steps()

    def training() -> Path:
        with run.locked(), Session() as session:
            steps.begin(config, run, resume=False)
            steps.validate(config, run)
            steps.load(config, run, session)
            steps.train(config, run, session)
        return run.adapter

    return training
