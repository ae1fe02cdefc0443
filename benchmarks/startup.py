"""From the start of the command to the end of its first step, of ours and of mlx_lm.lora.

The example with the same file for both; each evaluates the validation set before the first step. In
that time ours also validates the data, and writes and reads back the initial adapter. A run has
four steps, so that every tier of the example is due once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import report

REPEATS = 7
FLAGS = ["-c", "examples/geography.yaml", "--iters", "4"]
FLAGS += ["--steps-per-report", "1", "--steps-per-eval", "1000"]
OURS, STOCK = "nested-tune train", "mlx_lm.lora"


def main() -> None:
    """Run both in turn from the root of a checkout, after one of each that is not counted."""
    seconds: dict[str, list[float]] = {OURS: [], STOCK: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(REPEATS + 1):
            for name, first_step in ((OURS, _ours), (STOCK, _stock)):
                took = first_step(Path(folder) / f"{name.split()[0]}-{repeat}")
                if repeat > 0:
                    seconds[name].append(took)
    report("startup", seconds, STOCK)


def _ours(target: Path) -> float:
    program = str(Path(sys.executable).with_name("nested-tune"))
    metrics = target / "metrics.jsonl"

    def is_there(process: subprocess.Popen[str]) -> bool:
        time.sleep(0.005)
        ended = process.poll() is not None
        return (metrics.exists() and '"loss"' in metrics.read_text(encoding="utf-8")) or ended

    return _until(is_there, [program, "train", *FLAGS, "--run-dir", str(target)])


def _stock(target: Path) -> float:
    def is_there(process: subprocess.Popen[str]) -> bool:
        line = next(iter(process.stdout or ()), "")
        return "Train loss" in line or not line

    command = [sys.executable, "-m", "mlx_lm", "lora", "--train", *FLAGS]
    return _until(is_there, [*command, "--adapter-path", str(target)])


def _until(is_there: Callable[[subprocess.Popen[str]], bool], command: list[str]) -> float:
    """Seconds from the start of `command` until `is_there`; it is left to end by itself."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not is_there(process):
        pass
    took = time.perf_counter() - began
    output, _ = process.communicate()
    if process.returncode not in (0, 4):  # the gate may refuse what one step has made
        raise SystemExit(f"{command[:4]} ended with {process.returncode}:\n{output[-2000:]}")
    return took


if __name__ == "__main__":
    main()
