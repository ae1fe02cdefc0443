"""A step of the trainer, as a run takes it, against the step alone, on rows of one length.

    python -m benchmarks.trainer_step ROWS.jsonl --sizes 0.5B 3B

The step alone is that of `python -m benchmarks.gpu`, arm `ours`: batches in memory, one step in
flight, the loss read every fourth. The trainer reads its data from disk, reports every 10 steps,
and looks whether each tensor that is due has changed. They take turns, each time in a process of
its own; a row has all windows of one. On a CPU the two compute in different types. `--report`
prints the table alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.commands import read_rows, write_model
from benchmarks.gpu.shapes import KEYS, RANK, RATE, SCALE, SHAPES, Shape
from nested_core.backend import import_mlx_lm, prepare, set_operations_per_commit

REPORT, WARM, WINDOWS = 10, 4, 12  # steps a window, windows not counted, windows counted
ROWS = 64
ALONE, TRAINER = "alone", "trainer"


def main() -> None:
    """Measure each size, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--sizes", nargs="+", default=["0.5B", "3B"], choices=SHAPES)
    parser.add_argument("--times", type=int, default=2, help="processes of each")
    parser.add_argument("--folder", type=Path, default=Path("build/trainer_step"))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--only", choices=(ALONE, TRAINER), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only is not None:  # the process of one measurement
        (size,) = arguments.sizes
        row = {"size": size, "what": arguments.only}
        row |= measure(arguments.only, SHAPES[size], arguments.folder / size)
        with arguments.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return
    for size in () if arguments.report else arguments.sizes:
        for what in (ALONE, TRAINER) * arguments.times:
            words = [str(arguments.rows), "--folder", str(arguments.folder), "--sizes", size]
            command = [sys.executable, "-m", "benchmarks.trainer_step", *words, "--only", what]
            subprocess.run(command, check=True)
    for line in make_table(read_rows(arguments.rows)):
        print(line, flush=True)


def measure(what: str, shape: Shape, folder: Path) -> dict[str, Any]:
    """Milliseconds of a step in each window, and the most memory of MLX."""
    prepare()
    import_mlx_lm()
    set_operations_per_commit(shape.weights)
    import mlx.core as mx

    from benchmarks.gpu.mlx_arms import build, our_loop

    seconds: list[float]
    if what == ALONE:
        seconds = our_loop(build(shape, 16), shape, {})["seconds"]
    else:
        seconds = train(shape, folder)
    return {
        "milliseconds": [round(1000 * each, 2) for each in seconds],
        "peak_gib": round(mx.get_peak_memory() / 2**30, 3),
    }


def train(shape: Shape, folder: Path) -> list[float]:
    """Seconds of a step in each window of REPORT steps, of a run as `train` makes it."""
    from nested_core.config.loading import load_config
    from nested_core.pipeline import steps
    from nested_core.storage.run_directory import RunDirectory

    config = load_config(write_inputs(shape, folder))
    shutil.rmtree(folder / "run", ignore_errors=True)
    run = RunDirectory(folder / "run")
    run.path.mkdir(parents=True)
    ends: list[float] = []

    def note(step: int, count: int) -> None:
        """Note when each window's last step was sent, its report not yet made."""
        if step % REPORT == 0:
            ends.append(time.perf_counter())

    def begin(trainer: Any) -> None:
        trainer.on_step = note

    with run.locked():
        steps.write_run_config(config, run, resume=False)
        steps.validate(config, run)
        steps.write_initial_adapter_and_tiers(config, run)
        steps.train(config, run, on_start=begin)
    pairs = list(zip(ends, ends[1:], strict=False))[WARM:]
    return [(end - start) / REPORT for start, end in pairs]


def write_inputs(shape: Shape, folder: Path) -> Path:
    """A model of random weights, texts of exactly a row's tokens, and the configuration."""
    data = folder / "data"
    if not (folder / "model" / "config.json").exists():
        write_model(folder / "model", shape)
    data.mkdir(parents=True, exist_ok=True)
    words = shape.vocabulary - 8
    with (data / "train.jsonl").open("w", encoding="utf-8") as file:
        for row in range(ROWS):
            drawn = [f"w{(row * 7919 + at * 104_729) % words}" for at in range(shape.length)]
            file.write(json.dumps({"text": " ".join(drawn)}) + "\n")
    settings = {
        "model": str(folder / "model"),
        "data": str(data),
        "batch_size": shape.batch,
        "max_seq_length": shape.length + 1,
        "num_layers": -1,
        "iters": REPORT * (WARM + WINDOWS + 1),
        "steps_per_report": REPORT,
        "steps_per_eval": 10**6,
        "save_every": 10**6,
        "learning_rate": RATE,
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": KEYS},
    }
    (folder / "lora.yaml").write_text(json.dumps(settings).replace("1e-", "1.0e-"))
    return folder / "lora.yaml"


def make_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line each size: medians of all processes' medians, and the trainer's share of the speed."""
    for size in dict.fromkeys(row["size"] for row in rows):
        medians = {
            what: [
                statistics.median(row["milliseconds"])
                for row in rows
                if (row["size"], row["what"]) == (size, what)
            ]
            for what in (ALONE, TRAINER)
        }
        alone, trainer = (statistics.median(medians[what]) for what in (ALONE, TRAINER))
        listed = {what: ", ".join(f"{each:.2f}" for each in own) for what, own in medians.items()}
        yield (
            f"{size}: the step alone {listed[ALONE]} ms, the trainer's {listed[TRAINER]} ms: "
            f"{alone / trainer:.3f} of its speed"
        )


if __name__ == "__main__":
    main()
