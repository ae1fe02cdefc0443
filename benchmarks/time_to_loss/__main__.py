"""`python -m benchmarks.time_to_loss ROWS.jsonl`: what is not in the file yet is run and appended.

Models that are missing are pretrained first. A call ends within `--seconds`; what runs then is
dropped (a pretraining goes on from where it last saved), and the next call goes on. `--report
FOLDER` writes tables and plots instead. Needs mlx, mlx-lm and numpy; of ours, what needs no more.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from ctypes.util import find_library
from pathlib import Path

from benchmarks.time_to_loss.arms import ARMS, RIVAL, arm_of
from benchmarks.time_to_loss.models import SIZES, digest_of, is_made
from benchmarks.time_to_loss.report import write_report
from benchmarks.time_to_loss.rows import RATES, TUNING_SEED, Run, Study, missing, read


def main() -> None:
    """Run what is missing, or write the report of what there is."""
    options = parse()
    study = Study(
        options.sizes,
        options.arms,
        options.seeds,
        options.rates,
        {n: s.steps for n, s in SIZES.items()},
    )
    if options.report:
        write_report(options.report, read(options.rows), study)
        return
    end = time.monotonic() + options.seconds
    models = options.models or options.rows.parent / "models"
    for size in options.sizes:
        if not is_made(models / size):
            work(models, size, options.rows, [[]], end)
        refuse_another_base(options.rows, size, models / size)
        while not options.models_only and (runs := missing(read(options.rows), study, size)):
            parts = options.processes if runs[0].seed == TUNING_SEED else 1
            work(models, size, options.rows, [runs[i::parts] for i in range(parts)], end)
    print(f"{options.rows}: {len(read(options.rows))} rows; nothing is missing", flush=True)


def refuse_another_base(rows: Path, size: str, folder: Path) -> None:
    """Losses from two base models are not to be compared; exits where the file holds another's."""
    if {row["base"] for row in read(rows) if row["size"] == size} - {digest_of(folder)}:
        raise SystemExit(
            f"{rows} has runs of another model of {size} than {folder}. Give the folder that they "
            f"were made with by --models, or another file."
        )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_loss", description=__doc__)
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--models", type=Path, help="beside ROWS.jsonl unless given")
    parser.add_argument("--models-only", action="store_true", help="pretrain, and run nothing")
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["2M", "22M", "85M"])
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), help="mlx_lm, ours, ours+1-2-4+deep ..."
    )
    parser.add_argument("--seeds", type=int, default=5, help="measured seeds")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--processes", type=int, default=1, help="of the grid, which is not timed")
    parser.add_argument("--report", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    for name in options.arms:
        if name != RIVAL:
            arm_of(name)
    return options


def work(models: Path, size: str, rows: Path, parts: list[list[Run]], end: float) -> None:
    """Have a process do each part; exits where the time is over or a process failed."""
    processes = [start(models, size, rows, runs) for runs in parts if runs or len(parts) == 1]
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{rows}: {len(read(rows))} rows; call again to go on") from None
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if failed := [process.returncode for process in processes if process.returncode != 0]:
        raise SystemExit(f"a process for {size} failed with {failed[0]}")
    print(f"{rows}: {len(read(rows))} rows", flush=True)


def start(models: Path, size: str, rows: Path, runs: list[Run]) -> subprocess.Popen[bytes]:
    """A process for some runs of one side, or for the model."""
    is_rival = any(run.arm == RIVAL for run in runs)
    lists = [json.dumps(list(vars(run).values())) for run in runs]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.time_to_loss.worker", models, size, rows, *lists],
        env=os.environ | (rival_environment() if is_rival else {}),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def rival_environment() -> dict[str, str]:
    """OpenBLAS for mlx_lm where it computes on a CPU, as ours has it there."""
    names = {each.name.lower() for each in importlib.metadata.distributions() if each.name}
    has_cuda = any(name.startswith("mlx-cuda") for name in names)
    library = find_library("openblas")
    return {"LD_PRELOAD": library} if library and sys.platform == "linux" and not has_cuda else {}


if __name__ == "__main__":
    main()
