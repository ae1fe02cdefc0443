"""A training in two ranks under a worker: lost and cancelled, it behaves like one process."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from nested_core import seams
from tests.production.faults import FaultTable
from tests.production.processes import processes_with
from tests.production.stack import Stack
from tests.production.test_faults import Training, cancel_and_retry

pytestmark = [
    pytest.mark.production,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not seams.is_there("ranks"), reason="the room ranks is not here"),
]

TWO_RANKS: dict[str, Any] = {"training": {"processes": 2, "max_grad_norm": 1.0}}
SECONDS_TO_END = 15


def test_kill_9_of_a_rank(stack: Stack, faults: FaultTable) -> None:
    training = Training(stack, "killed-rank", **TWO_RANKS).until(20)
    (rank,) = set(stack.processes_of(training.id)) & set(processes_with("MLX_RANK=1"))
    began = time.monotonic()
    os.kill(rank, signal.SIGKILL)
    state, seconds = training.final_state(began)
    assert state == "Failed"
    assert "Rank 1 of 2 exited with code -9" in str(stack.flow_run(training.id).state)
    assert seconds < SECONDS_TO_END
    assert training.is_unpromoted()
    held = f"checkpoint of step {training.step()}"
    training.go_on()
    faults.add("kill -9 of one rank of two", state, held, seconds, "a retry resumes, promoted once")


def test_cancelled_while_two_ranks_train(stack: Stack, faults: FaultTable) -> None:
    training = Training(stack, "cancelled-ranks", **TWO_RANKS).until(20)
    cancel_and_retry(training, faults, "cancel while two ranks train")
