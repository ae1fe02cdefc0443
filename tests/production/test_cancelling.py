"""A cancel in each of the other tasks: Cancelled, nothing left behind, and a retry ends promoted.

Each task is made to take long by what it works on, and the cancel comes while it is under way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from nested_core import registry as core
from nested_core.registry.folders import shared_folder_lock
from tests.production.faults import FaultTable
from tests.production.processes import command_of
from tests.production.stack import Stack, wait_for
from tests.production.test_faults import SLOT_IS_FREE_WITHIN, Training
from tests.production.test_production import add, champion

pytestmark = [pytest.mark.production, pytest.mark.timeout(600)]

TRAIN_LINES, VALID_LINES = 40_000, 2_000
# What each task takes long for: so many examples that judging them takes seconds, and the gate too;
# layers that are probed; a registry that is held by somebody else.
TASKS = ("validate", "load", "gate", "register")
ON_LARGE_DATA = ("validate", "gate")
PROBED_FOR_LONG = {"strategy": "parameter_importance", "probe_batches": 400}
SECONDS_AWAY = 30
SHORT = {"iters": 12, "save_every": 4, "steps_per_eval": 12}


def write_large_data(stack: Stack, name: str) -> str:
    """Rows that no other test has: what was tokenised for another is kept, and takes no time."""
    data = f"examples/{name}-large"
    folder = stack.home / data
    folder.mkdir()
    sizes = {"train": range(TRAIN_LINES), "valid": range(TRAIN_LINES, TRAIN_LINES + VALID_LINES)}
    for split, numbers in sizes.items():
        rows = [example(f"{name} {number}") for number in numbers]
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return data


def example(town: str) -> str:
    question = {"role": "user", "content": f"I want to see town {town}. Where to?"}
    answer = {"role": "assistant", "content": "Go and see Kabul, the capital of Afghanistan!"}
    return json.dumps({"messages": [question, answer]}) + "\n"


@contextmanager
def registry_held_after_the_gate(stack: Stack, training: Training) -> Iterator[None]:
    """Hold the adapter's registry from the gate's proof on, as an audit elsewhere would.

    It can be read meanwhile: who is champion and what the policy asks for is read before the task.
    """
    add(stack, 41, "never", training.name)

    def is_proving() -> bool:
        return any("mlx_lm_program" in command_of(p) for p in stack.processes_of(training.id))

    wait_for(is_proving, 180)
    with shared_folder_lock(stack.registry / training.name):
        yield


@contextmanager
def task_under_way(stack: Stack, name: str, task: str) -> Iterator[Training]:
    """A training of which this task is at work; of `register` until the block ends."""
    changes: dict[str, Any] = dict(SHORT)
    if task in ON_LARGE_DATA:
        changes["data"] = write_large_data(stack, name)
    if task == "load":
        changes["nested"] = PROBED_FOR_LONG
    training = Training(stack, name, **changes)
    held = registry_held_after_the_gate(stack, training) if task == "register" else nullcontext()
    with held:
        wait_for(lambda: stack.is_running(training.id, task), 180)
        yield training


@pytest.mark.parametrize("task", TASKS)
def test_cancelled_in_a_task_before_or_after_training(stack, faults, task) -> None:
    with task_under_way(stack, f"cancelled-{task}", task) as training:
        began = time.monotonic()
        stack.cancel(training.id)
        state, seconds = training.final_state(began)
        wait_for(lambda: not stack.processes_of(training.id), 60)
    assert state == "Cancelled"
    assert seconds < SLOT_IS_FREE_WITHIN
    assert training.is_unpromoted()
    step = training.step()
    assert step == (SHORT["iters"] if task in ("gate", "register") else 0)
    training.go_on(has_begun=step > 0)
    held = f"checkpoint of step {step}" if step else "nothing trained yet"
    faults.add(f"cancel in {task}", state, held, seconds, "a retry does the rest, promoted once")


@pytest.mark.parametrize("task", ["validate", "gate", "register"])
def test_the_server_is_away_while_a_task_ends_and_publishes(stack, faults, task) -> None:
    """Killed while the task is under way, and away until that has ended: the run goes on."""
    with task_under_way(stack, f"away-{task}", task) as training:
        stack.kill_server()
    time.sleep(SECONDS_AWAY)
    stack.start_server()
    state, _ = training.final_state(seconds=400)
    assert state == "Completed", stack.flow_run(training.id).state
    assert champion(stack, training.name) is not None
    then = "what cannot be published is left out, and the run goes on"
    faults.add(f"server away while {task} ends", state, "the finished run", None, then)


def test_cancelled_in_promote(stack: Stack, faults: FaultTable) -> None:
    name = "cancelled-promote"
    version = add(stack, 42, name=name)
    with shared_folder_lock(stack.registry / name):  # what is read before the task may be read
        section: dict[str, Any] = {
            "registry": str(stack.registry),
            "name": name,
            "version": version,
        }
        run_id = stack.submit("promote/auto", **section)
        wait_for(lambda: stack.is_running(run_id, "promote"), 90)
        began = time.monotonic()
        stack.cancel(run_id)
        ended = stack.wait(run_id)
        seconds = time.monotonic() - began
        wait_for(lambda: not stack.processes_of(run_id), 60)
    assert ended.state_name == "Cancelled"
    assert seconds < SLOT_IS_FREE_WITHIN
    assert champion(stack, name) is None
    stack.wait(stack.submit("promote/auto", **section))
    assert champion(stack, name) == version
    assert len(core.history(stack.registry, name)) == 1
    faults.add("cancel in promote", "Cancelled", "registered", seconds, "promoted when asked again")
