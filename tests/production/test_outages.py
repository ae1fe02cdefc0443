"""The server or the whole machine is away for minutes: what lives goes on, what died is ended."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from nested_core import registry as core
from nested_core.records.metrics import read_metrics
from tests.production.faults import FaultTable
from tests.production.processes import processes_with
from tests.production.stack import DEAD_WITHIN, Stack, wait_for
from tests.production.test_faults import Training

pytestmark = [pytest.mark.production, pytest.mark.timeout(3600)]

ENDLESS: dict[str, Any] = {"iters": 1_000_000, "save_every": 200, "steps_per_eval": 1_000_000}
SECONDS_AWAY = (45, 90, 120, 200)
SECONDS_WATCHED = 45  # after each: the first heartbeat, and the automation's looks
SECONDS_OFF = 300


def last_reported_step(training: Training) -> int:
    """The last step in metrics.jsonl; a checkpoint may be minutes older."""
    return int(read_metrics(training.run.metrics)[-1]["step"])


def test_a_training_goes_on_while_the_server_is_away(stack: Stack, faults: FaultTable) -> None:
    training = Training(stack, "outages", **ENDLESS)
    wait_for(lambda: training.step() > 0, 300)
    os.setpriority(os.PRIO_PROCESS, stack.flow_process(training.id), 19)
    for seconds in SECONDS_AWAY:
        before = last_reported_step(training)
        stack.kill_server()
        time.sleep(seconds)
        stack.start_server()
        time.sleep(SECONDS_WATCHED)
        run = stack.flow_run(training.id)
        step = last_reported_step(training)
        print(f"away {seconds} s: {run.state_name}, step {before} -> {step}", flush=True)
        assert (run.state_name, run.run_count) == ("Running", 1)
        assert step > before
        faults.add(f"server away for {seconds} s", "Running", "-", None, "training goes on")
    stack.cancel(training.id)
    began = time.monotonic()
    state, ended_after = training.final_state(began, 120)
    assert state == "Cancelled"
    assert training.step() >= last_reported_step(training) > 0
    with stack.connected() as client:
        names = {state.name for state in client.read_flow_run_states(training.id)}
    assert not names & {"Crashed", "Resumed", "Failed"}, names
    held = f"checkpoint of step {training.step()}, written at the cancel"
    faults.add("cancel after the server was away", state, held, ended_after, "a retry resumes")


def test_after_the_machine_was_off_its_run_is_dead_within_the_bound_and_the_next_night_runs(
    stack: Stack, faults: FaultTable
) -> None:
    training = Training(stack, "machine-off", **ENDLESS)
    wait_for(lambda: training.step() > 0, 300)
    stack.kill_server()
    for worker in stack.workers.values():
        worker.kill()
        worker.wait()
    for process in processes_with(f"NESTED_TUNE_HOME={stack.home}"):
        if process != os.getpid():
            os.kill(process, signal.SIGKILL)
    time.sleep(SECONDS_OFF)
    stack.start_server()
    for pool in ("mlx-gpu", "cpu"):
        stack.start_worker(pool)
    began = time.monotonic()
    # Waits behind the dead one; of a name of its own, for the first night of the example's is
    # another test's.
    section = {"path": "registry", "name": "after-the-outage", "promote": "always"}
    night = stack.submit("finetune/geography-manual", registry=section)
    look = stack.submit("reconcile/geography-hourly", names=["after-the-outage"])
    stack.wait(training.id, "Crashed", "Resumed", "Pending", "Cancelled", seconds=DEAD_WITHIN)
    seconds = time.monotonic() - began
    print(f"dead {seconds:.0f} s after the start", flush=True)
    wait_for(lambda: stack.flow_run(training.id).state_name != "Crashed", 120)
    stack.cancel(training.id)  # it would go on for ever
    ended = stack.wait(night, seconds=600)
    said = str(stack.wait(look, seconds=DEAD_WITHIN).state)
    assert ended.state is not None
    assert ended.state.is_completed(), ended.state
    print(ended.state, said, flush=True)
    assert core.read_champion(stack.registry, "after-the-outage") is not None
    then = "it goes on by itself, and the night behind it runs"
    faults.add("machine off for 5 minutes", "Crashed", "a checkpoint", seconds, then)


def test_a_run_that_dies_just_after_a_state_event_is_ended(stack, faults) -> None:
    training = Training(stack, "died-at-once", **ENDLESS)
    wait_for(lambda: stack.flow_run(training.id).state_name == "Running", 120)
    began = time.monotonic()
    stack.workers["mlx-gpu"].kill()
    for process in stack.processes_of(training.id):
        os.kill(process, signal.SIGKILL)
    stack.workers["mlx-gpu"].wait()
    state, seconds = training.final_state(began, DEAD_WITHIN)
    stack.start_worker("mlx-gpu")
    assert state == "Crashed"
    assert seconds < 400
    wait_for(lambda: stack.flow_run(training.id).state_name != "Crashed", 120)
    stack.cancel(training.id)
    faults.add("kill -9 just after a state event", state, "-", seconds, "it goes on by itself")
