"""What the Prefect flow costs: `nested-tune run` against `nested-tune train` for the same work.

The start of the run's own server is timed in the same go and taken off: whoever runs flows often
has a server. Two sizes of work tell what is paid once from what grows with the work.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import Arm, report, run_once

REPEATS = 5
CONFIG = "examples/geography.yaml"
SMALL, LARGE = 120, 480
BAR_SECONDS, BAR_SHARE = 1.0, 0.01
SERVER = "the run's own server's start"


def main() -> None:
    """Run the comparison from the root of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PREFECT_HOME"] = str(Path(folder) / "prefect")
        os.environ.pop("PREFECT_API_URL", None)
        seconds = _time_in_turn(Path(folder))
    for size in (SMALL, LARGE):
        train, run = _name("train", size), _name("run", size)
        report(f"flow_overhead_{size}", {name: seconds[name] for name in (train, run)}, train)
    beyond = {size: _beyond_the_server(seconds, size) for size in (SMALL, LARGE)}
    grown = statistics.median(seconds[_name("train", LARGE)])
    grown -= statistics.median(seconds[_name("train", SMALL)])
    print(f"flow_overhead: {SERVER} takes {statistics.median(seconds[SERVER]):.2f} s")
    for size, each in beyond.items():
        bar = BAR_SECONDS + BAR_SHARE * statistics.median(seconds[_name("train", size)])
        found = statistics.median(each)
        spread = f"{min(each):.2f} to {max(each):.2f} over {len(each)} pairs"
        print(
            f"flow_overhead: {size} iterations: {found:.2f} s beyond it ({spread}), bar {bar:.2f}"
        )
    share = (statistics.median(beyond[LARGE]) - statistics.median(beyond[SMALL])) / grown
    print(f"flow_overhead: it grows by {share:.2%} of the training that is added")


def _name(command: str, size: int) -> str:
    return f"{command}, {size} iterations"


def _beyond_the_server(seconds: dict[str, list[float]], size: int) -> list[float]:
    """Of each pair, what the flow took longer than training and the start of its server."""
    runs, trains = seconds[_name("run", size)], seconds[_name("train", size)]
    pairs = zip(runs, trains, seconds[SERVER], strict=True)
    return [run - train - server for run, train, server in pairs]


def _time_in_turn(folder: Path) -> dict[str, list[float]]:
    """Wall seconds of each, A B C ..., after a warm-up of each that is not counted."""
    works: dict[str, Callable[[int], float]] = {}
    for size in (SMALL, LARGE):
        for command in ("train", "run"):
            works[_name(command, size)] = _command(folder, command, size)
    works[SERVER] = _start_server
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(REPEATS + 1):
        for name, work in works.items():
            took = work(repeat)
            if repeat:
                seconds[name].append(took)
    return seconds


def _command(folder: Path, command: str, size: int) -> Callable[[int], float]:
    program = str(Path(sys.executable).with_name("nested-tune"))
    run_dir = str(folder / f"{command}-{size}-{{n}}")
    flags = [command, "-c", CONFIG, "--iters", str(size), "--run-dir", run_dir]
    arm = Arm(_name(command, size), [program, *flags], {})
    return lambda repeat: run_once(arm, repeat)


def _start_server(repeat: int) -> float:
    """Seconds until a server answers, alone on the machine; ended again outside of the time."""
    from flows.process.local_server import LocalServer

    began = time.perf_counter()
    server = LocalServer()
    server.serve()
    server.wait()
    took = time.perf_counter() - began
    server.stop()
    return took


if __name__ == "__main__":
    main()
