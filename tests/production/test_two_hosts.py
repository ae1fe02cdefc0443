"""Two hosts: one training across both, and two workers of one pool with runs of their own.

docs/two-hosts.md has the commands, and what was seen of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nested_core import registry as core
from nested_core import seams
from nested_core.records.plan import read_plan
from nested_core.storage.checkpoint import latest_checkpoint
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.user_tmpdir import KERNELS_FOLDER_VARIABLE
from tests.example import write_config
from tests.production.hosts import THIS_MACHINE, Host, missing_for_hosts, two_hosts
from tests.production.postgresql import Cluster
from tests.production.processes import ranks_of, step_of
from tests.production.stack import NAME, NESTED_TUNE, Stack, wait_for

pytestmark = [pytest.mark.production, pytest.mark.timeout(1200)]

STEPS = 60
SECONDS = 600  # on a machine that does much else
SECONDS_OF_SILENCE = 20.0  # above what a step takes on a machine that does much else
SECONDS_TO_END = 20  # to print stacks, and to be seen


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts of this test's own."""
    if missing := missing_for_hosts():
        pytest.skip(missing)
    with two_hosts(tmp_path) as pair:
        yield pair


@dataclass
class Ranks:
    """Trainings that host a starts on both hosts, in a folder that both see."""

    folder: Path
    hosts: tuple[Host, Host]

    def write_config(self, name: str, *, save_every: int = 2, **training: Any) -> None:
        """A configuration of STEPS steps, with these keys in its section `training`."""
        write_config(
            self.folder / name,
            iters=STEPS,
            batch_size=4,
            val_batches=1,
            steps_per_report=2,
            save_every=save_every,
            training={"max_grad_norm": 1.0} | training,
        )

    def write_hostfile(self) -> str:
        """The hosts' addresses, and what their processes need of this one's environment."""
        names = ("NESTED_TUNE_CACHE", KERNELS_FOLDER_VARIABLE)
        ours = [f"{name}={os.environ[name]}" for name in names]
        listed = [{"ssh": host.address, "ips": [host.address]} for host in self.hosts]
        path = self.folder / "hosts.json"
        path.write_text(json.dumps({"envs": ours, "hosts": listed}))
        return str(path)

    def start(self, config: str, run: str, *flags: str) -> subprocess.Popen[bytes]:
        """Start `nested-tune train` on host a."""
        words = (NESTED_TUNE, "train", "-c", config, "--run-dir", run, *flags)
        return self.hosts[0].start(self.folder, self.log, *words)

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    def end(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        """The exit code of a training, and what it printed."""
        code = process.wait(SECONDS)
        printed = self.log.read_text()
        self.log.unlink()
        return code, printed

    def until(self, run: str, step: int) -> None:
        """Wait until a step is reported."""
        wait_for(lambda: step_of(self.folder / run / "metrics.jsonl") >= step, SECONDS)

    def checkpoint(self, run: str) -> int:
        found = latest_checkpoint(self.folder / run / "checkpoints")
        return 0 if found is None else found.step

    def adapter(self, run: str) -> bytes:
        return (self.folder / run / "adapter" / "adapters.safetensors").read_bytes()


@pytest.fixture
def ranks(tmp_path: Path, hosts: tuple[Host, Host]) -> Ranks:
    """Trainings of one rank on each host."""
    if not seams.is_there("ranks"):
        pytest.skip("the room ranks, which trains on both hosts, is not here")
    folder = tmp_path / "home"
    folder.mkdir()
    made = Ranks(folder, hosts)
    made.write_config("two.yaml", hostfile=made.write_hostfile())
    made.write_config("one.yaml")
    return made


def test_a_rank_killed_on_the_other_host_ends_all_and_the_run_goes_on_to_the_bit(ranks) -> None:
    whole = ranks.end(ranks.start("two.yaml", "whole"))
    assert whole[0] in (0, 4), whole[1]  # whether it was a good run is not asked
    process = ranks.start("two.yaml", "run")
    wait_for(lambda: ranks.checkpoint("run") >= 8, SECONDS)  # it comes after the step's report
    os.kill(ranks_of(ranks.folder)[1], signal.SIGKILL)
    code, printed = ranks.end(process)
    assert code == 1
    assert "Rank 1 of 2 on 10.77.0.2 exited with code 255 (ssh's: " in printed
    assert "subprocess.CalledProcessError" not in printed  # of mlx.launch, which ends the others
    wait_for(lambda: not ranks_of(ranks.folder))
    assert 8 <= ranks.checkpoint("run") < STEPS
    code, printed = ranks.end(ranks.start("two.yaml", "run", "--resume"))
    assert code == whole[0], printed
    assert ranks.adapter("run") == ranks.adapter("whole")


def test_a_run_of_two_hosts_goes_on_in_one_process_and_says_from_which_step(ranks: Ranks) -> None:
    process = ranks.start("two.yaml", "run")
    ranks.until("run", 8)
    ranks.hosts[0].run(NESTED_TUNE, "stop", str(ranks.folder / "run"))
    code, printed = ranks.end(process)
    assert code == 5, printed
    stopped_at = ranks.checkpoint("run")
    code, printed = ranks.end(ranks.start("one.yaml", "run", "--resume"))
    assert code in (0, 4), printed
    said = f"has changed: 2 from step 0 on, 1 from step {stopped_at} on."
    assert said in " ".join(printed.split())
    plan = read_plan(RunDirectory(ranks.folder / "run").plan)
    assert plan is not None
    assert plan.rank_counts == ((0, 2), (stopped_at, 1))


@pytest.mark.parametrize("comes_back", [True, False])
def test_ranks_between_which_packets_are_dropped_are_ended_within_the_bound_and_go_on_once(
    ranks: Ranks, comes_back: bool
) -> None:
    ranks.write_config(
        "quick.yaml",
        save_every=20,
        hostfile=ranks.write_hostfile(),
        hang_timeout=SECONDS_OF_SILENCE,
    )
    process = ranks.start("quick.yaml", "run")
    ranks.until("run", 26)  # the checkpoint of step 20 allowed the two steps after it more time
    begun = set(ranks_of(ranks.folder).values())
    ranks.hosts[1].drop_packets()
    silent_since = time.monotonic()
    wait_for(lambda: not begun & set(ranks_of(ranks.folder).values()))
    assert time.monotonic() - silent_since < SECONDS_OF_SILENCE + SECONDS_TO_END
    if comes_back:
        ranks.hosts[1].let_packets_through()
    code, printed = ranks.end(process)
    assert "took a step for as long as training.hang_timeout" in printed
    assert "rank 0 waited too long: Current thread 0x" in printed
    plan = read_plan(RunDirectory(ranks.folder / "run").plan)
    assert plan is not None
    if comes_back:
        assert code in (0, 4), printed
        assert (plan.resumed_at, ranks.checkpoint("run")) == ((20,), STEPS)
    else:
        assert code == 1
        assert "Rank 1 of 2 on 10.77.0.2 exited with code 255 (ssh's: " in printed
        assert ranks.checkpoint("run") == 20
    wait_for(lambda: not ranks_of(ranks.folder))


LONG: dict[str, Any] = {"iters": 400, "save_every": 10, "val_batches": 1, "steps_per_eval": 200}


@dataclass
class TwoWorkers:
    """A server here, and a worker of one pool on each host, with runs of their own."""

    stack: Stack

    def runs(self, letter: str) -> Path:
        """The host's own runs/, as this machine sees it."""
        return self.stack.folder / letter / "runs"

    def signal_worker(self, letter: str, number: signal.Signals) -> None:
        """Send a signal to the worker itself, a child of what entered the host."""
        entered = self.stack.workers[letter].pid
        (worker,) = Path(f"/proc/{entered}/task/{entered}/children").read_text().split()
        os.kill(int(worker), number)

    def checkpoint(self, letter: str) -> int:
        for run in self.runs(letter).glob("*/checkpoints"):
            if found := latest_checkpoint(run):
                return found.step
        return 0


@pytest.fixture
def workers(tmp_path: Path, binaries: Path, hosts: tuple[Host, Host]) -> Iterator[TwoWorkers]:
    """Everything deployed, and no worker yet."""
    stack = Stack(tmp_path / "stack", Cluster(binaries), address=THIS_MACHINE)
    stack.hosts = dict(zip("ab", hosts, strict=True))
    made = TwoWorkers(stack)
    try:
        stack.start()
        for letter, host in stack.hosts.items():
            for name in ("runs", "prefect"):
                (stack.folder / letter / name).mkdir(parents=True)
            (stack.home / "runs").mkdir(exist_ok=True)
            host.mount(made.runs(letter), stack.home / "runs")
            host.mount(stack.folder / letter / "prefect", stack.folder / "prefect")
        yield made
    finally:
        stack.stop()


def test_a_retry_on_the_other_host_says_what_is_missing_and_resumes_once_it_is_there(
    workers: TwoWorkers,
) -> None:
    stack = workers.stack
    stack.start_worker("mlx-gpu", name="a")
    run_id = stack.submit("finetune/geography-manual", **LONG)
    wait_for(lambda: workers.checkpoint("a") >= 20, SECONDS)
    os.kill(stack.flow_parent(run_id), signal.SIGKILL)
    stack.wait(run_id, "Crashed")
    workers.signal_worker("a", signal.SIGSTOP)
    stack.start_worker("mlx-gpu", name="b")

    # Resumed by the automation, on the host that does not have it.
    failed = stack.wait(run_id, "Failed", seconds=SECONDS)
    said = str(failed.state.message if failed.state else "")
    (folder,) = workers.runs("a").iterdir()
    assert f"began on the host host-a, which has its folder {stack.home}/runs/{folder.name}" in said
    assert "rsync -a host-a:" in said
    assert not list(workers.runs("b").iterdir())

    shutil.copytree(folder, workers.runs("b") / folder.name, symlinks=True)
    time.sleep(3)  # a worker reports the end of a run's process a second time
    stack.retry(run_id)
    wait_for(lambda: stack.flow_run(run_id).state_name != "Failed")
    ended = stack.wait(run_id, seconds=SECONDS)
    assert ended.state_name == "Promoted", ended.state
    assert "last from step-" in str(ended.state.message if ended.state else "")
    assert stack.flow_run(run_id).labels["nested-tune.host"] == "host-b"
    assert core.read_champion(stack.registry, NAME) is not None
    workers.signal_worker("a", signal.SIGCONT)
