"""The suite again and again: `python -m tests.again`, which goes on where it was ended.

Ten runs of `make test` with another seed of hypothesis and another order of files each, four of
them beside four busy processes, and two runs of the tests that `make test-all` adds. OpenBLAS
computes with its kernels for this processor and for older ones in turn, for they round differently.
Each run is a line of build/again/runs.jsonl; a run that is there is not made again. The exit code
is 1 if one of them failed. What each printed is kept beside that file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FAST = "not slow and not reliability and not production and not real"
SLOW = "slow and not reliability and not production"
BUSY = [sys.executable, "-c", "while True: pass"]
# OPENBLAS_CORETYPE of a run: none, for this processor's own kernels, or an older x86 processor's.
KERNELS = "", "Haswell", "Sandybridge", "Prescott"
# The name of each run, what it selects, its seed, and how many busy processes work beside it.
RUNS = [(f"test-{seed}", FAST, seed, 4 if seed >= 6 else 0) for seed in range(10)]
RUNS += [(f"slow-{seed}", SLOW, seed, 0) for seed in range(2)]


def make(name: str, selects: str, seed: int, busy: int, folder: Path) -> dict[str, Any]:
    """Make a run; the row that is kept of it."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal"]
    command += ["-m", selects, f"--hypothesis-seed={seed}", f"--file-order-seed={seed}"]
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    if kernels := KERNELS[seed % len(KERNELS)]:
        environment["OPENBLAS_CORETYPE"] = kernels
    began = time.monotonic()
    others = [subprocess.Popen(BUSY) for _ in range(busy)]
    try:
        with (folder / f"{name}.txt").open("w") as file:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    finally:
        for process in others:
            process.kill()
            process.wait()
    printed = (folder / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+)", printed, re.MULTILINE)
    seconds = time.monotonic() - began
    return {"name": name, "code": done.returncode, "seconds": seconds, "failed": failed}


def main() -> int:
    """Make the runs that are missing, and say how all ended."""
    folder = ROOT / "build" / "again"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.jsonl"
    path.touch()
    rows = {row["name"]: row for row in map(json.loads, path.read_text().splitlines())}
    for run in RUNS:
        if run[0] not in rows:
            rows[run[0]] = make(*run, folder)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[run[0]]) + "\n")
        print(rows[run[0]], flush=True)
    return int(any(row["code"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
