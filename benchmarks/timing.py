"""Whole commands timed in turn, so that a machine whose speed drifts is fair to all of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Arm:
    """One command of a comparison, with what is added to its environment."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]


def time_in_turn(arms: Sequence[Arm], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each arm, A B C A B C ..., after one warm-up of each that is not counted.

    `{n}` in a command stands for the number of the run, so that each has a folder of its own.
    """
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for run in range(repeats + 1):
        for arm in arms:
            took = run_once(arm, run)
            if run > 0:
                seconds[arm.name].append(took)
    return seconds


def run_once(arm: Arm, run: int) -> float:
    """Wall seconds of one run of a command, which must succeed."""
    command = [part.replace("{n}", str(run)) for part in arm.command]
    began = time.perf_counter()
    done = subprocess.run(
        command, env=os.environ | arm.environment, capture_output=True, text=True, check=False
    )
    took = time.perf_counter() - began
    if done.returncode != 0:
        raise SystemExit(f"{arm.name} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return took


def report(name: str, seconds: Mapping[str, Sequence[float]], rival: str) -> None:
    """Print each arm's ratio to the rival, the median over the pairs, and keep it as JSON."""
    rows: dict[str, Any] = {}
    for arm, times in seconds.items():
        ratios = [own / other for own, other in zip(times, seconds[rival], strict=True)]
        rows[arm] = {"ratio": statistics.median(ratios), "of": rival, "seconds": list(times)}
        spread = f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} pairs"
        print(f"{name}: {arm} takes {rows[arm]['ratio']:.2f} of {rival} ({spread})", flush=True)
    keep(name, {"arms": rows})


def keep(name: str, figures: Mapping[str, Any]) -> None:
    """Write a measurement's figures, with the machine they are of, as results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    machine = {"platform": platform.platform(), "cores": os.cpu_count()}
    document = {"name": name, "machine": machine} | dict(figures)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
