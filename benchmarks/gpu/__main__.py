"""`python -m benchmarks.gpu ROWS.jsonl`: what is not in the file yet is measured and appended.

Each arm runs in a process of its own; a call ends within `--seconds`, and the next one goes on.
Needs mlx, mlx-lm, numpy and pydantic; torch, transformers and peft for the rival. Nothing else of
ours.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.commands import MemoryWatch
from benchmarks.gpu.parts import NAME as PARTS
from benchmarks.gpu.parts import describe_gain

SIZES = ("0.5B", "1.7B", "7B", "135M")
TIERED = "ours", "ours+deep"
ARMS = ("mlx_lm", *TIERED, PARTS, "ours+ops=5", "peft-compile", "peft-eager")
SLOW = {"peft-compile": 120.0, "peft-eager": 60.0}  # seconds that an arm may need
MARGIN = 45.0


def main() -> None:
    """Measure what is missing, then print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--again", action="store_true", help="measure what is in the file too")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    done = (
        set()
        if options.again
        else {(r["size"], r["arm"]) for r in read(options.rows) if "error" not in r}
    )
    for size in options.sizes:
        for arm in options.arms:
            left = end - time.monotonic()
            if (size, arm) not in done and left > SLOW.get(arm, MARGIN):
                measure(options.rows, size, arm, left)
    report(read(options.rows))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(path: Path, size: str, arm: str, seconds: float) -> None:
    """Run one arm and append its row, or the end of what it said."""
    module = "peft_arms" if arm.startswith("peft") else "mlx_arms"
    command = [*launcher(arm), sys.executable, "-m", f"benchmarks.gpu.{module}", size, arm]
    began = time.perf_counter()
    receive, send = os.pipe()  # mlx.launch looks at its input all the time where that has ended
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, stdin=receive, start_new_session=True, **pipes)
    watch = MemoryWatch()
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with every rank
        process.communicate()
        return
    finally:
        os.close(receive)
        os.close(send)
        held = round(watch.stop() / 2**30, 2)
    took = round(time.perf_counter() - began, 1)
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if process.returncode == 0 and lines:
        result = json.loads(lines[-1]) | {"took": took, "device_gib": held}
    else:
        result = {"size": size, "arm": arm, "error": errors[-1500:], "took": took}
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")
    shown = {k: v for k, v in result.items() if k not in ("shape", "windows")}
    print(json.dumps(shown), flush=True)


def launcher(arm: str) -> list[str]:
    """What starts an arm's ranks, each on a GPU of its own; nothing where it has one."""
    ranks = [word.removeprefix("ranks=") for word in arm.split("+") if word.startswith("ranks=")]
    start = "from mlx._distributed_utils.launch import main; main()"
    return [sys.executable, "-c", start, "-n", ranks[0], "--"] if ranks else []


def report(rows: list[dict[str, Any]]) -> None:
    """One line a row: tokens/s and peak, and their ratios to each rival at that size."""
    latest = {(row["size"], row["arm"]): row for row in rows if "error" not in row}
    for (size, arm), row in latest.items():
        parts = [
            f"{size:5} {arm:22} {row['tokens_per_second']:8,} tokens/s {row['peak_gib']:6.2f} GiB"
        ]
        if row.get("forecast_gib"):
            parts.append(f"{row['forecast_gib'] / row['peak_gib'] - 1:+.1%} forecast")
        if row.get("device_gib"):
            parts.append(f"{row['device_gib']:.1f} GiB by NVML")
        if row.get("joules"):
            tokens = row["shape"]["batch"] * row["shape"]["length"]
            parts.append(f"{1000 * row['joules'] / tokens:.1f} J per 1,000 tokens")
        name, _, options = arm.partition("+")
        same = f"mlx_lm+{options}" if name == "ours" and options else "mlx_lm"
        for rival in dict.fromkeys((same, "mlx_lm", "peft-compile")):
            other = latest.get((size, rival))
            if other is not None and arm not in (rival, PARTS):
                speed = row["tokens_per_second"] / other["tokens_per_second"]
                memory = row["peak_gib"] / other["peak_gib"]
                parts.append(f"{speed:.2f} x {rival} (memory {memory:.2f})")
        alone = "+".join(word for word in arm.split("+") if not word.startswith("ranks="))
        if alone != arm and (size, alone) in latest:
            speed = row["tokens_per_second"] / latest[size, alone]["tokens_per_second"]
            parts.append(f"{speed:.2f} x one GPU; bytes a step {row['bytes_sent_by_due_tiers']}")
        if arm == PARTS:
            pair = [latest[size, each] for each in TIERED if (size, each) in latest]
            parts.append(describe_gain(row, [each["tokens_per_second"] for each in pair]))
        print("  ".join(parts), flush=True)


if __name__ == "__main__":
    main()
