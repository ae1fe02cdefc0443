"""1,000,000 chat rows (450 MB) read and judged with all line checks on, against a json.loads loop.

Beside it mlx-lm's own loading of the same file, which checks nothing. On all cores, and on one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.chats import write_chats
from benchmarks.timing import Arm, report, time_in_turn

ROWS, VALID_ROWS = 1_000_000, 1_000
REPEATS = 5
SECONDS_BETWEEN_LOOKS = 0.1
RIVAL = "json.loads loop"
LOOP = "import json, sys\nfor line in open(sys.argv[1], 'rb'):\n    json.loads(line)"
MLX_LM = (
    "import sys, pathlib, types\nfrom mlx_lm.tuner.datasets import load_local_dataset\n"
    "load_local_dataset(pathlib.Path(sys.argv[1]), None, types.SimpleNamespace())"
)


def main() -> None:
    """Write the file once and run the comparison on it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_chats(folder / "train.jsonl", ROWS)
        write_chats(folder / "valid.jsonl", VALID_ROWS, seed=1)
        report("reading_all_cores", time_in_turn(_arms(folder, []), REPEATS), RIVAL)
        if pin := shutil.which("taskset"):
            arms = _arms(folder, [pin, "--cpu-list", str(min(os.sched_getaffinity(0)))])
            report("reading_one_core", time_in_turn(arms, REPEATS), RIVAL)
        for arm in _arms(folder, [])[1:]:
            largest, together = _peak_memory(arm)
            print(
                f"reading_memory: {arm.name} holds at most {together:.0f} MB resident in all its "
                f"processes, {largest:.0f} MB in the largest",
                flush=True,
            )


def _arms(folder: Path, pin: list[str]) -> list[Arm]:
    ours = [str(Path(sys.executable).with_name("nested-tune")), "validate", "--data", str(folder)]
    train = str(folder / "train.jsonl")
    return [
        Arm(RIVAL, [*pin, sys.executable, "-c", LOOP, train], {}),
        Arm("nested-tune validate", [*pin, *ours, "--no-tokenize", "--json"], {}),
        Arm("mlx-lm's loading", [*pin, sys.executable, "-c", MLX_LM, str(folder)], {}),
    ]


def _peak_memory(arm: Arm) -> tuple[float, float]:
    """Resident MB at most: of one process, and of the command and its children together."""
    largest = together = 0.0
    with subprocess.Popen(arm.command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            sizes = _resident(process.pid)
            largest, together = max([largest, *sizes]), max(together, sum(sizes))
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if process.returncode != 0:
        raise SystemExit(f"{arm.name} failed with {process.returncode}")
    return largest, together


def _resident(pid: int) -> list[float]:
    """Resident MB of a process and of each of its children."""
    command = ["ps", "-A", "-o", "pid=,ppid=,rss="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    return [size / 1024 for own, parent, size in rows if pid in (own, parent)]


if __name__ == "__main__":
    main()
