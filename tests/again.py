"""The suite again and again: `python -m tests.again`, which goes on where it was ended.

Ten runs of `make test` with another seed of hypothesis and another order of files each, four of
them beside four busy processes; two runs of the tests that `make test-all` adds; and 200 runs of
tests that start threads or processes, each of which has a test for each place in the code that
starts one, as all such tests take minutes. Those run in one process each, three such processes on
two cores, which costs less than two workers for each. OpenBLAS computes with its kernels for this
processor and for older ones in turn, for they round differently. Each run is a line of
build/again/runs.jsonl; a run that is there is not made again. The exit code is 1 if one of them
failed. What each printed is kept beside that file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAST = "not slow and not reliability and not production and not real"
SLOW = "slow and not reliability and not production"
FAST_RUNS, SLOW_RUNS, STARTER_RUNS = 10, 2, 200
BUSY_RUNS, BUSY_PROCESSES = 4, 4
STARTER_RUNS_AT_ONCE = 3
STARTERS_FOLDER = "starters"  # where the runs of `make test` write which tests start something
# OPENBLAS_CORETYPE of a run: none, for this processor's own kernels, or an older x86 processor's.
KERNELS = "", "Haswell", "Sandybridge", "Prescott"


@dataclass(frozen=True)
class Run:
    """A run of pytest that is planned: what it selects, its seed, and what works beside it.

    The seed also decides which of OpenBLAS' KERNELS it has.
    """

    name: str
    selects: str
    seed: int
    busy_processes: int = 0

    def command(self, folder: Path) -> list[str]:
        """The words to run; the seed is hypothesis', and decides the order of files."""
        words = [sys.executable, "-m", "pytest", "-q"]
        words += [f"--hypothesis-seed={self.seed}", f"--file-order-seed={self.seed}"]
        if self.selects == STARTERS_FOLDER:
            return [*words, "-n", "0", f"@{write_starters(folder, self)}"]
        words += ["-n", "auto", "--dist", "worksteal", "-m", self.selects]
        # In one word: pytest would take a folder that is there for one of tests.
        return [*words, f"--note-starters={folder / STARTERS_FOLDER}"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    name: str
    code: int
    counts: str
    wall_seconds: float
    cpu_seconds: float
    failed: list[str]


def planned_runs() -> list[Run]:
    """All runs, in order; the tests that start something are known after the first."""
    runs = []
    for number in range(FAST_RUNS):
        busy = BUSY_PROCESSES if number >= FAST_RUNS - BUSY_RUNS else 0
        runs.append(Run(f"test-{number}", FAST, number, busy))
    runs += [Run(f"slow-{number}", SLOW, number) for number in range(SLOW_RUNS)]
    runs += [Run(f"starters-{number}", STARTERS_FOLDER, number) for number in range(STARTER_RUNS)]
    return runs


def write_starters(folder: Path, run: Run) -> Path:
    """The tests of a run that start threads or processes, as a file of arguments."""
    arguments = folder / f"{run.name}-arguments.txt"
    drawn = draw_starters(read_starters(folder / STARTERS_FOLDER), run.seed)
    arguments.write_text("\n".join(drawn), encoding="utf-8")
    return arguments


def read_starters(folder: Path) -> dict[str, set[str]]:
    """The tests of `make test` that start threads or processes, and from which places each does."""
    starts: dict[str, set[str]] = {}
    for path in folder.glob("*.jsonl"):
        for note in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            starts.setdefault(note["test"], set()).update(note["starts"])
    return starts


def draw_starters(starts: Mapping[str, Set[str]], seed: int) -> list[str]:
    """Draw tests at random until each starting place is reached; one that adds none is skipped."""
    tests = sorted(starts)
    random.Random(seed).shuffle(tests)
    seen: set[str] = set()
    drawn = []
    for test in tests:
        if not starts[test] <= seen:
            drawn.append(test)
            seen |= starts[test]
    return drawn


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that take a core each until the block ends."""
    program = "while True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def make(run: Run, folder: Path) -> Outcome:
    """Make a run; what it prints is kept beside the list of runs."""
    began = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    if kernels := KERNELS[run.seed % len(KERNELS)]:
        environment["OPENBLAS_CORETYPE"] = kernels
    output = folder / f"{run.name}.txt"
    with busy_processes(run.busy_processes), output.open("w") as file:
        process = subprocess.Popen(
            run.command(folder), cwd=ROOT, env=environment, stdout=file, stderr=file
        )
        _, status, used = os.wait4(process.pid, 0)  # what this run used, and no other
    code = process.returncode = os.waitstatus_to_exitcode(status)
    wall, cpu = time.monotonic() - began, used.ru_utime + used.ru_stime
    printed = output.read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+)", printed, re.MULTILINE)
    counts = re.findall(r"^\d+ (?:passed|failed).* in [\d.]+s.*$", printed, re.MULTILINE)
    return Outcome(run.name, code, "".join(counts[-1:]), wall, cpu, failed)


def make_all(runs: list[Run], folder: Path, at_once: int) -> Iterator[Outcome]:
    """Make runs, so many at once; each outcome as it comes."""
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for done in as_completed([pool.submit(make, run, folder) for run in runs]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # where somebody ends it, no other run begins


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """The runs that were made, by name."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {row["name"]: Outcome(**row) for row in map(json.loads, lines)}


def main(words: list[str]) -> int:
    """Make the runs that are missing, and say how all ended."""
    parser = argparse.ArgumentParser(prog="python -m tests.again", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "again")
    parser.add_argument("--only", default="", help="runs whose names begin with this")
    arguments = parser.parse_args(words)
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.jsonl"
    outcomes = read_outcomes(path)
    planned = [run for run in planned_runs() if run.name.startswith(arguments.only)]
    missing = [run for run in planned if run.name not in outcomes]
    starters = [run for run in missing if run.selects == STARTERS_FOLDER]
    # What the others note of starters must be there before one of these is drawn.
    others = [run for run in missing if run not in starters]
    for at_once, runs in (1, others), (STARTER_RUNS_AT_ONCE, starters):
        for outcome in make_all(runs, folder, at_once):
            outcomes[outcome.name] = outcome
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            said = f"exit {outcome.code}, {outcome.counts}; {outcome.cpu_seconds:.0f} CPU-s"
            print(f"{outcome.name}: {said}", flush=True)
    failed = [outcomes[run.name] for run in planned if outcomes[run.name].code != 0]
    for outcome in failed:
        print(f"{outcome.name} failed: {', '.join(outcome.failed)}; {folder / outcome.name}.txt")
    print(f"{len(planned) - len(failed)} of {len(planned)} runs passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
