"""Training that begins again by itself, by volume: kills at drawn moments, and requests to stop.

KILLS, STOPS and MEMORY_KILLS say how many; the figures of full volumes are in
benchmarks/faults.md.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nested_core.errors import TrainingProcessLost, TrainingStopped
from nested_core.records.plan import read_plan
from nested_core.storage.run_directory import RunDirectory
from tests.builders.suites import task, write_suite
from tests.example import write_config
from tests.flows.conftest import PROGRAM, ended, start
from tests.waiting import wait_until

pytestmark = [pytest.mark.reliability, pytest.mark.timeout(14400)]

SIGNALS = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE)
MOST_KILLS = 10  # of one run
SHARE_OF_TRAINING = 0.25  # that a process gets on at most, of those that are killed in it
SHARE_OF_BEGINNINGS = 0.2  # of kills, in a process that has not come to its run yet
# What a process is at, by the first of these functions that one of its threads is in.
MOMENTS = {
    "write_checkpoint": "writes a checkpoint",
    "ask": "asks questions",
    "evaluate": "evaluates",
    "judge": "gate",
    "_train_steps": "steps",
    "finetune": "between",
}
# Notes a hundred times a second what every thread is in; the process it is in is the one that the
# parent began.
WATCH = """
import os, sys, threading, time
def watch(file):
    while True:
        names = []
        for frame in sys._current_frames().values():
            while frame is not None:
                names.append(frame.f_code.co_name)
                frame = frame.f_back
        text = " ".join([str(os.getpid()), *names]).encode()
        os.pwrite(file, text + b"\\n", 0)
        time.sleep(0.01)
if "NESTED_TUNE_PARENT" in os.environ and "MOMENT" in os.environ:
    file = os.open(os.environ["MOMENT"], os.O_WRONLY | os.O_CREAT, 0o600)
    threading.Thread(target=watch, args=(file,), daemon=True).start()
"""


def bytes_of(run: Path) -> dict[str, bytes]:
    """The adapter, and weights and optimizer state of every checkpoint."""
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*.safetensors"))}


class Restarted:
    """Runs of one command in a folder, whose training processes are watched and killed."""

    def __init__(self, folder: Path, command: str, seed: int) -> None:
        suite = write_suite(folder / "capitals.jsonl", 40)
        write_config(
            folder / "config.yaml",
            iters=200,
            save_every=10,
            steps_per_eval=10,
            steps_per_report=5,
            gate={"tasks": [task(suite, max_drop=None)]},
            training={"restarts": 20, "evaluate_tasks": ["capitals"], "keep_checkpoints": 99},
        )
        (folder / "sitecustomize.py").write_text(WATCH)
        self.folder = folder
        self.command = command
        self.dice = random.Random(f"{command} {seed}")
        self.kills: Counter[tuple[str, str]] = Counter()
        self.runs = 0
        self._seconds = {"begins": 0.0, "trains": 0.0}

    def begin(self, name: str) -> subprocess.Popen[str]:
        words = (self.command, "-c", "config.yaml", "--run-dir", name)
        (self.folder / "moment").write_text("0\n")
        moment = str(self.folder / "moment")
        return start(*words, cwd=self.folder, PYTHONPATH=str(self.folder), MOMENT=moment)

    def moment(self) -> tuple[int, str]:
        """The process that was watched last, and what it is at."""
        process, *names = (self.folder / "moment").read_text().partition("\n")[0].split()
        at = next((at for name, at in MOMENTS.items() if name in names), "begins")
        return int(process), at

    def run_undisturbed(self) -> dict[str, bytes]:
        """The bytes to compare with; notes how long it takes."""
        process = self.begin("plain")
        began = time.monotonic()
        wait_until(lambda: self.moment()[1] not in ("begins", "between"), process=process)
        trained = time.monotonic()
        wait_until(lambda: self.moment()[1] == "gate", process=process)
        self._seconds = {"begins": trained - began, "trains": time.monotonic() - trained}
        done = ended(process, 600)
        assert done.code == 0, done.stderr
        return bytes_of(self.folder / "plain")

    def run_with_kills(self, most: int, expected: dict[str, bytes]) -> None:
        """A run of which so many processes are killed; it ends by itself as the plain one."""
        name = f"killed-{self.runs}"
        run = RunDirectory(self.folder / name)
        process = self.begin(name)
        kills: list[tuple[str, str]] = []
        last = 0
        while len(kills) < most:
            early = bool(kills) and self.dice.random() < SHARE_OF_BEGINNINGS
            not_at = () if early else ("begins", "between")
            if not self._await_process(process, last, not_at):
                break
            most_seconds = self._seconds["begins"]
            if not early:
                most_seconds = self._seconds["trains"] * SHARE_OF_TRAINING
            deadline = time.monotonic() + self.dice.uniform(0, most_seconds)
            while time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.005)
            last, at = self.moment()
            number = SIGNALS[(self.kills.total() + len(kills)) % len(SIGNALS)]
            if process.poll() is not None or last not in children_of(process):
                break
            os.kill(last, number)
            kills.append((number.name, at))
        done = ended(process, 900)
        assert done.code == 0, done.stderr
        plan = read_plan(run.plan)
        assert plan is not None
        if len(plan.ended_by) < len(kills):  # the last one came when all was done
            kills.pop()
        assert plan.ended_by == tuple(name for name, _ in kills)
        if kills:
            assert (plan.describe_ends(None) or "none") in run.report.read_text()
        assert bytes_of(run.path) == expected
        self.kills.update(kills)
        self.runs += 1

    def _await_process(
        self, process: subprocess.Popen[str], last: int, not_at: Sequence[str]
    ) -> bool:
        """Whether another training process than the last has come past these moments."""
        while process.poll() is None:
            found, at = self.moment()
            if found not in (0, last) and at not in not_at:
                return True
            time.sleep(0.01)
        return False

    def describe(self) -> str:
        by_signal = Counter[str]()
        by_moment = Counter[str]()
        for (name, at), count in self.kills.items():
            by_signal[name] += count
            by_moment[at] += count
        return (
            f"{self.command}: {self.kills.total()} kills in {self.runs} runs, all ended by "
            f"themselves with the bytes of the undisturbed one; {dict(by_signal)}; "
            f"{dict(by_moment)}"
        )


def children_of(process: subprocess.Popen[str]) -> list[int]:
    try:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except OSError:
        return []
    return list(map(int, listed.split()))


@pytest.mark.parametrize(("command", "share"), [("train", 0.8), ("run", 0.2)])
def test_kills_at_drawn_moments_cost_no_run(tmp_path, capsys, command, share) -> None:
    kills = round(share * int(os.environ.get("KILLS", "20")))
    restarted = Restarted(tmp_path, command, seed=51)
    expected = restarted.run_undisturbed()
    while (left := kills - restarted.kills.total()) > 0:
        restarted.run_with_kills(min(left, MOST_KILLS), expected)
        with capsys.disabled():
            print(restarted.describe(), flush=True)


def test_a_kill_at_each_moment_costs_nothing(tmp_path: Path) -> None:
    restarted = Restarted(tmp_path, "train", seed=0)
    expected = restarted.run_undisturbed()
    process = restarted.begin("killed")
    killed = 0
    moments = ("steps", "evaluates", "asks questions", "writes a checkpoint", "gate")
    for wanted in moments:

        def is_there(wanted: str = wanted, killed: int = killed) -> bool:
            trains, at = restarted.moment()
            return at == wanted and trains != killed

        wait_until(is_there, process=process)
        (killed,) = children_of(process)
        os.kill(killed, signal.SIGKILL)
    done = ended(process, 600)
    assert done.code == 0, done.stderr
    assert f"killed {len(moments)} times (SIGKILL)" in done.stdout
    assert bytes_of(tmp_path / "killed") == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_asks_it_to_stop_wants_no_other(tmp_path: Path, number: int) -> None:
    restarted = Restarted(tmp_path, "train", seed=number)
    for _ in range(int(os.environ.get("STOPS", "2"))):
        process = restarted.begin("stopped")
        wait_until(lambda: restarted.moment()[1] not in ("begins", "between"), process=process)
        time.sleep(restarted.dice.uniform(0, 0.5))
        trains = children_of(process)
        process.send_signal(number)
        stopped = ended(process, 300)
        assert stopped.code == TrainingStopped.exit_code, stopped.stderr
        assert "by itself" not in stopped.stderr
        assert [restarted.moment()[0]] == trains
        shutil.rmtree(tmp_path / "stopped")


MEMORY = Path("/sys/fs/cgroup/memory")  # version 1, where it is mounted
LIMIT_BYTES = 700 * 10**6
# Has the process take more than that when it has reported so often, between two checkpoints.
GROW = """
import os, sys, threading, time
def grow():
    while True:
        try:
            if open("run/metrics.jsonl").read().count("\\n") > 15: break
        except OSError: pass
        time.sleep(0.01)
    held = [b"x" * 10**7 for _ in range(100)]
    time.sleep(60)
if "NESTED_TUNE_PARENT" in os.environ: threading.Thread(target=grow, daemon=True).start()
"""


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group whose processes may have LIMIT_BYTES together."""
    group = MEMORY / f"nested-tune-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
    except OSError:
        pytest.skip("makes a control group for memory, of version 1")
    yield group
    wait_until(lambda: (group / "cgroup.procs").read_text() == "")
    group.rmdir()


def start_in(group: Path, folder: Path) -> subprocess.Popen[str]:
    """`train` in a control group, growing beyond it."""
    (folder / "sitecustomize.py").write_text(GROW)
    enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    words = ("train", "-c", "config.yaml", "--run-dir", "run")
    return subprocess.Popen(
        ["sh", "-c", enter, str(group), str(PROGRAM), *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def memory_kills(group: Path) -> int:
    counts = dict(map(str.split, (group / "memory.oom_control").read_text().splitlines()))
    return int(counts["oom_kill"])


@pytest.mark.parametrize("is_raised", [True, False], ids=["raised", "kept"])
def test_memory_kills_are_named_and_end_where_the_limit_is_raised(
    tmp_path: Path, memory_group: Path, is_raised: bool
) -> None:
    write_config(tmp_path / "config.yaml", iters=60, save_every=20, steps_per_report=2)
    for _ in range(int(os.environ.get("MEMORY_KILLS", "1"))):
        (memory_group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
        before = memory_kills(memory_group)
        process = start_in(memory_group, tmp_path)
        if is_raised:
            wait_until(lambda: memory_kills(memory_group) > before, process=process)  # noqa: B023
            (memory_group / "memory.limit_in_bytes").write_text("-1")
        done = ended(process, 600)
        assert "because memory ran out: a smaller batch_size" in done.stderr
        assert done.code == (0 if is_raised else TrainingProcessLost.exit_code), done.stderr
        if not is_raised:
            assert done.stderr.count("because memory ran out") == 4
            assert "4 times in a row without a new checkpoint" in done.message()
            assert "The limit of its control group is 0.7 GB" in done.message()
        shutil.rmtree(tmp_path / "run")
