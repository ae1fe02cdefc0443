"""`run` and signals: a checkpoint, exit 5, a Cancelled flow run, and no server left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings

from nested_core.storage.checkpoint import latest_checkpoint
from tests.example import write_config
from tests.flows.conftest import PROGRAM, completed, ended, start
from tests.flows.test_cli_signals import interrupt
from tests.prefect_home import new_prefect_home
from tests.production.processes import processes_with
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow("starts a server and trains until it is stopped, each in a process")
]  # several processes, each with a server of its own

RUN = ("run", "-c", "config.yaml", "--run-dir", "run")


def session(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """`nested-tune run` with a server of its own, in a session of its own as in a terminal."""
    return subprocess.Popen(
        [str(PROGRAM), *RUN, *flags],
        cwd=folder,
        env=os.environ | {"PREFECT_HOME": str(folder / "prefect")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_training(folder: Path) -> bool:
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") > 2


def servers_of(folder: Path) -> list[int]:
    """Processes that were started with this test's Prefect home, and still run."""
    return processes_with(f"PREFECT_HOME={folder / 'prefect'}\0")


def wait_for_no_servers(folder: Path) -> None:
    wait_until(lambda: servers_of(folder) == [], lambda: f"no server but {servers_of(folder)}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_ctrl_c_checkpoints_exits_5_leaves_no_server_and_the_run_goes_on_to_its_end(
    prefect_server: None, tmp_path: Path
) -> None:
    write_config(tmp_path / "config.yaml", iters=5000, val_batches=1, steps_per_report=2)
    new_prefect_home(tmp_path / "prefect")
    process = session(tmp_path)
    wait_until(lambda: is_training(tmp_path), process=process)
    assert len(servers_of(tmp_path)) == 3  # the command, its small parent and the server
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends to all in it
    stopped = ended(process)
    assert stopped.code == 5, stopped.stderr
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert f"stopped at step {checkpoint.step} of 5000" in stopped.message()
    assert servers_of(tmp_path) == []
    server = str(get_current_settings().api.url)
    to_an_end = (*RUN, "--resume", "--iters", checkpoint.step + 4)
    resumed = completed(*to_an_end, cwd=tmp_path, PREFECT_API_URL=server)
    assert resumed.code in (0, 4), resumed.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_bytes())["step"] == (
        checkpoint.step + 4
    )


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_neither_a_second_ctrl_c_nor_a_kill_leaves_a_server_behind(tmp_path: Path) -> None:
    write_config(
        tmp_path / "config.yaml",
        iters=10**6,
        batch_size=8,
        grad_accumulation_steps=400,  # many seconds a step
        val_batches=0,
        nested={"frequencies": [1]},
    )
    new_prefect_home(tmp_path / "prefect")
    process = session(tmp_path)
    wait_until((tmp_path / "run" / "metrics.jsonl").exists, process=process)
    interrupt(process, sends_to_group=True)
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process).code == 130
    wait_for_no_servers(tmp_path)

    process = session(tmp_path, "--resume")
    wait_until(lambda: len(servers_of(tmp_path)) > 2, process=process)
    process.kill()
    process.communicate()
    wait_for_no_servers(tmp_path)


def test_sigterm_while_training_ends_as_a_cancelled_flow_run(prefect_server, tmp_path) -> None:
    write_config(tmp_path / "config.yaml", iters=5000, val_batches=1, steps_per_report=2)
    server = str(get_current_settings().api.url)
    process = start(*RUN, cwd=tmp_path, PREFECT_API_URL=server)
    wait_until(lambda: is_training(tmp_path), process=process)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.code == 5, stopped.stderr
    state = state_of(tmp_path)
    assert state.name == "Cancelled"
    assert "resumable by a retry of this flow run: Training was stopped at step" in str(
        state.message
    )


def state_of(folder: Path) -> State:
    """The state of the flow run whose data the server keeps for this folder's process."""
    with get_client(sync_client=True) as client:
        newest = max(client.read_flow_runs(), key=lambda run: str(run.created))
    assert newest.state is not None
    return newest.state
