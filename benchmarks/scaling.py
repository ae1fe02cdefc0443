"""How a step's time grows with due layers and with tokens, and whether it stays over 10,000 steps.

A Llama of 12 layers of 256 and a vocabulary of 4,096 on this machine's CPU; straight lines are
fitted by least squares. The steps of one long run are those of the shipped example.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.gpu.mlx_arms import build
from benchmarks.gpu.shapes import RATE, Shape
from benchmarks.tiers import depths, optimizer_for
from benchmarks.timing import keep
from nested_core import backend

SHAPE = Shape(256, 12, 704, 8, 8, 4096, 4, 128)
ROWS = (1, 2, 3, 4, 6, 8)
ROUNDS, WIDTH_OF_CHART = 7, 50
LONG_RUN, REPORT = 10_000, 250
SILENT: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def main() -> None:
    """Print two charts with their fits and the drift of one long run; keep all as JSON."""
    backend.prepare()
    found = measure_fits()
    for name, fit in found.items():
        show(name, fit)
    drift = measure_drift()
    share = drift["last_of_first"]
    print(f"scaling: {LONG_RUN:,} steps: the last tenth takes {share:.3f} of the first")
    keep("scaling", {"fits": found, "drift": drift})


def measure_fits() -> dict[str, dict[str, Any]]:
    """The lines over due layers, with the rows of SHAPE, and over tokens, with all layers due."""
    import mlx.core as mx

    from nested_core.kernels.optimized_model import using_optimized_layers

    model = build(SHAPE, bits=16)
    model.set_dtype(mx.float32)
    model.train()
    with using_optimized_layers(model):
        steps = make_steps(model)
        return {
            "due layers": line(time_in_rounds({k: steps(k, SHAPE.batch) for k in range(1, 13)})),
            "tokens": line(time_in_rounds({SHAPE.length * n: steps(12, n) for n in ROWS})),
        }


def make_steps(model: Any) -> Callable[[int, int], Callable[[], None]]:
    """For so many due layers, the deepest, and so many rows: one step, waited for."""
    import mlx.core as mx

    from nested_core.models.parameters import reference_trainable_parameters
    from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
    from nested_core.training.train_step import TrainStep

    refs = reference_trainable_parameters(model)
    loss = SUPERVISED_LOSS.for_model(model, refs)
    generator = np.random.default_rng(0)

    def make(due_layers: int, rows: int) -> Callable[[], None]:
        optimizer, tiers = tiers_of(refs, due_layers)
        size = (rows, SHAPE.length + 1)
        tokens = generator.integers(0, SHAPE.vocabulary, size).astype(np.int32)
        batch = tokens, np.ones((rows, SHAPE.length), np.bool_)
        train_step = TrainStep(
            model=model, parameters=refs, optimizer=optimizer, tiers=tiers, loss_fn=loss
        )

        def step() -> None:
            mx.eval(train_step.run([batch], (0,)).updates)

        return step

    return make


def tiers_of(refs: Any, due_layers: int) -> Any:
    """Tiers and their optimizer: the deepest layers in tier 0, the others in one not asked for."""
    from nested_core.optim.tier_assignment import TierMap

    tensors = {n: int(at < SHAPE.layers - due_layers) for n, at in depths(refs).items()}
    tiers = TierMap((1, 2)[: 1 + max(tensors.values())], tensors)
    return optimizer_for(tiers, refs, RATE), tiers


def time_in_rounds(steps: Mapping[int, Callable[[], None]]) -> dict[int, float]:
    """Median seconds of each step, all taken in turn, after one of each that compiles."""
    seconds: dict[int, list[float]] = {size: [] for size in steps}
    for number in range(ROUNDS + 1):
        for size, step in steps.items():
            began = time.perf_counter()
            step()
            if number > 0:
                seconds[size].append(time.perf_counter() - began)
    return {size: statistics.median(each) for size, each in seconds.items()}


def line(seconds: Mapping[int, float]) -> dict[str, Any]:
    """The least-squares line through the points, and how near they lie to it."""
    x, y = np.array(list(seconds)), np.array(list(seconds.values()))
    slope, start = np.polyfit(x, y, 1)
    off = y - (start + slope * x)
    return {
        "milliseconds": {size: round(1000 * each, 3) for size, each in seconds.items()},
        "start_ms": 1000 * start,
        "each_ms": 1000 * slope,
        "r_squared": 1 - float(off @ off / ((y - y.mean()) @ (y - y.mean()))),
        "largest_residual": float(np.abs(off / y).max()),
    }


def show(name: str, fit: Mapping[str, Any]) -> None:
    """A bar for every point, `|` where the line has it, and the line in words."""
    most = max(fit["milliseconds"].values())
    for size, milliseconds in fit["milliseconds"].items():
        bar = list("#" * round(WIDTH_OF_CHART * milliseconds / most)) + [" "] * WIDTH_OF_CHART
        fitted = (fit["start_ms"] + fit["each_ms"] * size) / most
        bar[min(round(WIDTH_OF_CHART * fitted), len(bar) - 1)] = "|"
        print(f"{size:>6} {name:<10} {milliseconds:8.2f} ms {''.join(bar).rstrip()}")
    print(
        f"scaling: {fit['start_ms']:.2f} ms and {fit['each_ms']:.4f} ms for each of {name}: "
        f"R^2 {fit['r_squared']:.4f}, no point further off than {fit['largest_residual']:.1%}",
        flush=True,
    )


def measure_drift() -> dict[str, Any]:
    """Step rates of one long run of the example; the first report, which compiles, is left out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = Path("examples/geography.yaml").read_text(encoding="utf-8")
        values = yaml.safe_load(text) | {"iters": LONG_RUN, "steps_per_report": REPORT}
        values |= {"steps_per_eval": LONG_RUN, "save_every": LONG_RUN, "learning_rate": 1e-6}
        (folder / "long.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        program = str(Path(sys.executable).with_name("nested-tune"))
        command = [program, "train", "-c", str(folder / "long.yaml"), "--run-dir"]
        subprocess.run([*command, str(folder / "run")], **SILENT, check=False)
        records = map(json.loads, (folder / "run" / "metrics.jsonl").open(encoding="utf-8"))
        rates = [each["iterations_per_second"] for each in records if each.get("loss")]
    if len(rates) != LONG_RUN // REPORT:
        raise SystemExit(f"the run of {LONG_RUN} steps made {len(rates)} reports")
    tenth = len(rates) // 10
    first, last = statistics.median(rates[1 : tenth + 1]), statistics.median(rates[-tenth:])
    return {"iterations_per_second": rates, "last_of_first": first / last}


if __name__ == "__main__":
    main()
