"""When a run of `--minutes` ends, with what verdict, and whether it is the run of `--iters`.

    python -m benchmarks.minutes ROWS.jsonl --modes quiet busy killed [--count 10]
    python -m benchmarks.minutes ROWS.jsonl --modes equal

Trains SmolLM2-135M-Instruct (`make real-model`) on a table of 75 tickets, each run on two cores of
its own, as many side by side as there are pairs of cores.

quiet: nothing else runs on the two cores.
busy: four endless loops run on them too.
killed: every process of the command gets SIGKILL at a drawn moment, then the command is given
    again with --resume; every second run has the four loops beside it.
equal: the same steps as a run of quiet or busy that was not cut, by --iters, with the number of
    BLAS threads that the run chose; compares the bytes of both adapters.

A run that has a row in ROWS.jsonl is passed over, so that a table can be made in several goes; with
`--seconds` nothing is begun that would not end in time. Runs are left in --folder. What ends later
than M + 4 minutes is killed and has no exit code.
"""

from __future__ import annotations

import argparse
import csv
import filecmp
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.backend import prepare
from nested_core.records.plan import read_plan
from nested_core.records.result import read_result
from nested_core.storage.run_directory import RunDirectory

ROOT = Path(__file__).parent.parent
MODES = ("quiet", "busy", "killed", "equal")
BURNERS = 4
EARLIEST_KILL, LATEST_KILL = 0.1, 0.95  # of the minutes
MINUTES_TO_GIVE_UP = 4  # beyond those that were asked for
AREAS = {
    "billing": ("the invoice", "a charge", "my refund", "the receipt", "the discount"),
    "shipping": ("the parcel", "my delivery", "the courier", "the tracking link", "the label"),
    "account": ("my password", "the login page", "my profile", "the confirmation", "my sign-in"),
}
SENTENCES = (
    "There is something wrong with {}.",
    "Please look at {}, it is not as expected.",
    "I have been waiting for days because of {}.",
    "Who can help me with {}?",
    "It concerns {}, which does not work since Monday.",
)
TABLE_FLAGS = ("--prompt-feature", "Description", "--completion-feature", "Team", "--suite", "8")
SYSTEM_TEXT = "Sort tickets. Answer with the name of the team alone."

_printing = threading.Lock()


@dataclass(frozen=True)
class Task:
    """One run to make, `mode` and `number` of which name its row and its folder.

    compared: the row of the run that an `equal` one repeats.
    """

    mode: str
    number: int
    compared: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.mode}-{self.number}"

    @property
    def has_burners(self) -> bool:
        """Whether endless loops run on the same cores."""
        if self.compared is not None:
            return False
        return self.mode == "busy" or (self.mode == "killed" and self.number % 2 == 1)


class Bench:
    """Makes runs of one configuration, and a row for each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.minutes: float = options.minutes
        self.folder: Path = options.folder.resolve()
        self.config = self.folder / "tickets.yaml"
        self._model = str(Path(options.model).resolve())
        folders = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}

    def prepare(self) -> None:
        """Write table and configuration, and compile MLX's kernels in a run of two steps."""
        if prepare().blas is None:
            raise SystemExit("OpenBLAS is missing (libopenblas.so.0): a step would take minutes")
        if self.config.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        table = self.folder / "tickets.csv"
        write_table(table)
        init = ("init", "--data", str(table), "--model", self._model, "-o", str(self.config))
        self._require(*init, *TABLE_FLAGS, "--system", SYSTEM_TEXT)
        warm_run = str(self.folder / "warm")
        self._require("train", "-c", str(self.config), "--iters", "2", "--run-dir", warm_run)

    def make_row(self, task: Task) -> dict[str, Any]:
        """Do one run on the cores of this thread."""
        row: dict[str, Any] = {"mode": task.mode, "number": task.number, "minutes": self.minutes}
        row["burners"] = BURNERS if task.has_burners else 0
        run = RunDirectory(self.folder / task.name)
        if task.compared is not None:
            return row | self._repeat(task.compared, run)
        with burning(row["burners"]):
            began = time.monotonic()
            length = ("--minutes", f"{self.minutes:g}")
            if task.mode == "killed":
                row["killed_after"], row["exit_code"] = self._kill(run, length, task.number)
            if row.get("killed_after") is not None or task.mode != "killed":
                row["exit_code"] = self._train(run, *length, resume=True)
            row["seconds"] = round(time.monotonic() - began, 1)
        return row | describe_run(run)

    def _repeat(self, compared: dict[str, Any], run: RunDirectory) -> dict[str, Any]:
        """Train the steps of another run by --iters, and compare the bytes of the adapters."""
        of = f"{compared['mode']}-{compared['number']}"
        threads = compared["blas_threads"]
        added = {} if threads is None else {"OPENBLAS_NUM_THREADS": str(threads)}
        iterations = str(compared["iterations"])
        began = time.monotonic()
        code = self._train(run, "--iters", iterations, resume=False, environment=added)
        seconds = round(time.monotonic() - began, 1)
        row = {"of": of, "exit_code": code, "seconds": seconds} | describe_run(run)
        row["blas_threads"] = threads
        row["is_equal"] = have_equal_adapters(self.folder / of / "adapter", run.adapter)
        return row

    def _train(
        self,
        run: RunDirectory,
        *length: str,
        resume: bool,
        environment: dict[str, str] | None = None,
    ) -> int | None:
        """The exit code of a whole `train`; None where it had to be given up."""
        words = self._words(run, *length, resume=resume and run.path.exists())
        with self._start(words, run, environment or {}) as process:
            try:
                return process.wait(60 * (self.minutes + MINUTES_TO_GIVE_UP))
            except subprocess.TimeoutExpired:
                kill_all(process)
                return None

    def _kill(
        self, run: RunDirectory, length: Sequence[str], number: int
    ) -> tuple[float | None, int | None]:
        """Start a `train`, and kill it at a moment drawn by its number.

        Returns the seconds until then, and None; or None and its exit code if it ended before.
        """
        share = random.Random(number).uniform(EARLIEST_KILL, LATEST_KILL)  # noqa: S311
        words = self._words(run, *length, resume=False)
        with self._start(words, run, {}) as process:
            try:
                return None, process.wait(60 * self.minutes * share)
            except subprocess.TimeoutExpired:
                kill_all(process)
                return round(60 * self.minutes * share, 1), None

    def _words(self, run: RunDirectory, *length: str, resume: bool) -> list[str]:
        words = ["train", "-c", str(self.config), "--run-dir", str(run.path), *length]
        return [*words, "--resume"] if resume else words

    @contextmanager
    def _start(
        self, words: Sequence[str], run: RunDirectory, environment: dict[str, str]
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A command that prints into a file beside its run, line by line with the time."""
        log = run.path.with_suffix(".log")
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", *words],
                stdout=file,
                stderr=file,
                cwd=self.folder,
                env=self._environment | environment,
            )
            try:
                yield process
            finally:
                kill_all(process)

    def _require(self, *words: str) -> None:
        command = [sys.executable, "-m", "flows.cli", *words]
        environment = self._environment | {"OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, check=False
        )
        if done.returncode not in (0, 4):
            raise SystemExit(f"{words[0]} ended with {done.returncode}:\n{done.stderr.decode()}")


def write_table(path: Path) -> None:
    """Seventy-five tickets, each with its team."""
    asked = [
        (sentence.format(subject), team)
        for sentence in SENTENCES
        for number in range(5)
        for team, subjects in AREAS.items()
        for subject in [subjects[number]]
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("Ticket", "Description", "Team"))
        writer.writerows((number, *row) for number, row in enumerate(asked, 1))


def describe_run(run: RunDirectory) -> dict[str, Any]:
    """What a run's folder says of its steps and of its verdict; None for what it does not say."""
    plan = read_plan(run.plan)
    time_plan = None if plan is None else plan.time
    verdict = json.loads(run.gate.read_bytes()) if run.gate.exists() else None
    result = read_result(run.result) if run.result.exists() else None
    return {
        "steps": None if result is None else result.step,
        "iterations": None if plan is None else plan.iterations,
        "fixed_steps": None if plan is None or time_plan is None else plan.steps,
        "was_cut": None if result is None or time_plan is None else result.ended == "time",
        "blas_threads": None if time_plan is None else time_plan.blas_threads,
        "seconds_a_step": None if time_plan is None else round(time_plan.seconds_a_step, 3),
        "seconds_to_judge": None if time_plan is None else round(time_plan.seconds_to_judge, 1),
        "judged_in": time_between(run.result, run.gate),
        "verdict": None if verdict is None else verdict["verdict"],
    }


def time_between(earlier: Path, later: Path) -> float | None:
    """Seconds between the last changes of two files; None if one is missing."""
    if not (earlier.exists() and later.exists()):
        return None
    return round(later.stat().st_mtime - earlier.stat().st_mtime, 1)


def have_equal_adapters(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, byte by byte."""
    name = "adapters.safetensors"
    with suppress(FileNotFoundError):
        return filecmp.cmp(one / name, other / name, shallow=False)
    return False


@contextmanager
def burning(count: int) -> Iterator[None]:
    """Within the block so many endless loops run on the cores of this thread."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a command, its children and theirs; returns when the command has ended."""
    ids = list_descendants(process.pid) if process.poll() is None else []
    for process_id in ids:
        with suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)
    process.wait()
    while any(is_running(process_id) for process_id in ids[1:]):  # it still holds the run's lock
        time.sleep(0.05)


def list_descendants(process_id: int) -> list[int]:
    """A process and all that it started, directly or not, from the oldest on (Linux)."""
    found = [process_id]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, task.read_text().split())
    return found


def is_running(process_id: int) -> bool:
    """Whether a process is there and no zombie (Linux)."""
    with suppress(OSError):
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def list_tasks(modes: Sequence[str], count: int, rows: Sequence[dict[str, Any]]) -> Iterator[Task]:
    """The runs that have no row yet; `equal` has one for each run that it can repeat."""
    made = {(row["mode"], row["number"]) for row in rows}
    repeated = {row["of"] for row in rows if row["mode"] == "equal"}
    for mode in modes:
        if mode != "equal":
            for number in range(count):
                if (mode, number) not in made:
                    yield Task(mode, number)
            continue
        number = sum(row["mode"] == "equal" for row in rows)
        for row in rows:
            name = f"{row['mode']}-{row['number']}"
            is_whole = row["mode"] in ("quiet", "busy") and row["was_cut"] is False
            if is_whole and row["verdict"] is not None and name not in repeated:
                yield Task("equal", number, row)
                number += 1


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that there are."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parse_cores(text: str) -> list[int]:
    """`0-3,8,9` as numbers."""
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return cores


def work_through(
    bench: Bench, tasks: queue.SimpleQueue[Task], cores: Sequence[int], rows: Path, end: float
) -> None:
    """Make runs on these cores as long as there are some and one more would end in time."""
    os.sched_setaffinity(0, cores)  # of this thread, and of what it starts
    while time.monotonic() + 60 * (bench.minutes + 2) <= end:
        try:
            task = tasks.get_nowait()
        except queue.Empty:
            return
        row = bench.make_row(task) | {"cores": list(cores)}
        with _printing:
            print(json.dumps(row), flush=True)
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")


def summarise(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each mode."""
    for mode in MODES:
        of_mode = [row for row in rows if row["mode"] == mode]
        if not of_mode:
            continue
        seconds = sorted(row["seconds"] for row in of_mode)
        judged = [row for row in of_mode if row["exit_code"] in (0, 4) and row["verdict"]]
        text = f"{mode}: {len(judged)} of {len(of_mode)} with a verdict"
        text += f", {seconds[0]} to {seconds[-1]} s"
        if mode == "equal":
            text += f", {sum(row['is_equal'] for row in of_mode)} equal to the byte"
        else:
            on_time = sum(0 <= row["seconds"] - 60 * row["minutes"] <= 60 for row in judged)
            cut = sum(bool(row["was_cut"]) for row in of_mode)
            text += f", {on_time} of these within M and M + 1 minutes, {cut} cut"
        yield text


def main() -> None:
    """Make the rows that are missing, and print a summary of all."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.minutes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES[:3])
    parser.add_argument("--count", type=int, default=10, help="runs of each mode")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--model", default=str(ROOT / "build/SmolLM2-135M-Instruct"))
    parser.add_argument("--folder", type=Path, default=ROOT / "build/minutes")
    parser.add_argument(
        "--cores", help="such as 0-15,32; all that this process may use if left out"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of this command")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    bench = Bench(options)
    bench.prepare()
    cores = parse_cores(options.cores) if options.cores else sorted(os.sched_getaffinity(0))
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in list_tasks(options.modes, options.count, read_rows(options.rows)):
        tasks.put(task)
    threads = [
        threading.Thread(target=work_through, args=(bench, tasks, pair, options.rows, end))
        for pair in zip(cores[::2], cores[1::2], strict=False)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("\n".join(summarise(read_rows(options.rows))))


if __name__ == "__main__":
    main()
