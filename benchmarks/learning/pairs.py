"""Whole commands in turns, alone on the device: `python -m benchmarks.learning.pairs ROWS.jsonl`.

`nested-tune train` with `init`'s file, its verdict included, beside mlx_lm.lora with what it can do
of that file (arm k), each from the start of its process to its end, with the most memory that NVML
saw; then both adapters are judged, unless `--unjudged`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

ARMS = ("c", "k")


def commands(arm: str, base: Path, folder: Path, seed: int) -> list[str]:
    """The command of an arm, whose file is written into the folder."""
    from benchmarks.learning.arms import of_init, suggest

    file = folder / f"{arm}.yaml"
    if arm == "c":
        file.write_text(json.dumps(suggest(base, folder) | {"seed": seed}), encoding="utf-8")
        return ["-m", "flows.cli", "train", "-c", str(file), "--run-dir", str(folder / "run")]
    values = of_init(base, folder, {}) | {"model": str(base), "data": str(folder / "data")}
    values |= {"adapter_path": str(folder / "adapter"), "seed": seed, "num_layers": -1}
    file.write_text(json.dumps(values), encoding="utf-8")
    return ["-m", "mlx_lm", "lora", "--train", "-c", str(file)]


def time_pairs(options: argparse.Namespace) -> None:
    """Append a row of each arm for each task and turn; turn 0 warms up."""
    from nested_core.backend import hide_torch_from_transformers, prepare

    hide_torch_from_transformers()
    prepare()
    from benchmarks.commands import MemoryWatch
    from benchmarks.learning.arms import read_judge, read_splits
    from benchmarks.learning.driver import code_commit
    from benchmarks.learning.study import LARGER

    for turn, task, arm in product(range(options.first, options.turns), options.tasks, ARMS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            read_splits(task, options.data, LARGER.counts).write(folder / "data")
            command = [sys.executable, *commands(arm, options.base, folder, turn)]
            watch = MemoryWatch()
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds = time.perf_counter() - began
            device_bytes = watch.stop()
            if done.returncode:
                print(f"{task} {arm} {turn}: exit {done.returncode}: {done.stderr[-1500:]}")
                continue
            adapter = folder / ("adapter" if arm == "k" else "run/adapter")
            row = {
                "task": task,
                "size": options.base.name,
                "arm": arm,
                "seed": turn,
                "seconds": round(seconds, 2),
                "device_bytes": device_bytes,
                "commit": code_commit(),
            }
            if not options.unjudged:
                judge = read_judge(task, options.base, options.data, LARGER.counts, "judge")
                row["right_share"] = judge.right_share(adapter)
            with options.rows.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(row)}\n")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of the tasks' repositories")
    parser.add_argument("--tasks", nargs="+", default=["banking77"])
    parser.add_argument("--first", type=int, default=0, help="turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--unjudged", action="store_true", help="measure seconds and memory alone")
    os.environ["NESTED_TUNE_DEVICE_LOCK"] = "off"
    time_pairs(parser.parse_args())


if __name__ == "__main__":
    main()
