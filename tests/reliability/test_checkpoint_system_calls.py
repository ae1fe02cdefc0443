"""A failure at every system call of a checkpoint, in turn: the old checkpoint or the new one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from nested_core.storage.atomic import remove_leftovers
from nested_core.storage.checkpoint import latest_checkpoint, write_checkpoint
from nested_core.storage.checkpoint_verification import list_checkpoints
from tests.core.registry.system_calls import (
    EVERY_CALL,
    FAILURES,
    SAMPLE,
    Failure,
    can_trace,
    each_call,
)

# The children of these forks only write arrays that are there already.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.timeout(900),
]
MEMORY = Path("/dev/shm")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory with the checkpoints of steps 1 and 2."""
    if not can_trace():
        pytest.skip("this machine lets no process be traced (ptrace)")
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    for step in (1, 2):
        save(folder / "checkpoints", step=step, value=float(step))
    yield folder
    shutil.rmtree(folder)


def save(folder: Path, *, step: int, value: float) -> None:
    adapter = {
        f"layers.0.{part}": mx.array(np.full((4, 4), value, dtype="f4"))
        for part in ("lora_a", "lora_b")
    }
    moments = {name: {"m": array, "v": array} for name, array in adapter.items()}
    write_checkpoint(
        folder,
        adapter=adapter,
        adapter_config={"num_layers": 1},
        optimizer_state=moments,
        state={"step": step, "value": value},
    )


@pytest.mark.claim(
    "On a CPU a killed run resumes to the bit (not under OpenBLAS's SkylakeX), or is complete"
)
@pytest.mark.parametrize("stride", [SAMPLE, EVERY_CALL])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("step", [2, 3])
def test_failure_at_a_call_leaves_the_checkpoint_of_before_or_the_new_one(
    folder: Path, step: int, failure: Failure, stride: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 3 is a new one; step 2 is there and is replaced, as after a resume from step 1."""
    new, old = 9.0, 2.0
    points = {old: 0, new: 0}
    for copy, has_returned in each_call(
        folder / "checkpoints", failure, stride, partial(save, step=step, value=new)
    ):
        remove_leftovers(copy)  # as each resume does first
        checkpoint = latest_checkpoint(copy)
        assert checkpoint is not None
        value = checkpoint.state["value"]
        assert value in (old, new)
        assert value == new or not has_returned
        assert all(np.array(a).flat[0] == value for a in checkpoint.parameters().values())
        assert {path.name for path in copy.iterdir()} == {p.name for p in list_checkpoints(copy)}
        points[value] += 1
        save(copy, step=step, value=new)
        checkpoint = latest_checkpoint(copy)
        assert checkpoint is not None
        assert checkpoint.state["value"] == new
    with capsys.disabled():
        print(f"\nstep {step}, {failure}: {points[old]} points left the old one, ", end="")
        print(f"{points[new]} the new one", end="")
    if stride == 1 and failure != "torn":
        assert min(points.values()) > 0
        assert sum(points.values()) > 100
