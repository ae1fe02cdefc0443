"""Two ranks under Prefect: the same tasks, artifacts and result as one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.finetune import FinetuneParameters, finetune
from nested_core.records.metrics import read_metrics
from nested_core.storage.run_directory import RunDirectory
from tests.example import example_settings
from tests.flows.conftest import task_runs

pytestmark = [
    pytest.mark.slow("trains two ranks"),
    pytest.mark.usefixtures("prefect_server", "forked_ranks"),
]


def test_training_in_two_ranks_is_one_task_of_the_flow(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    training = {"processes": 2, "max_grad_norm": 1.0}
    settings = example_settings(batch_size=4, steps_per_report=2, training=training)
    state = finetune(
        FinetuneParameters.model_validate(settings | {"run_dir": str(run.path)}), return_state=True
    )
    assert state.is_completed()
    assert str(state.message).startswith("passed the gate: validation loss")
    tasks = task_runs(state, "validate", "load", "train", "gate")
    assert [task.run_count for task in tasks.values()] == [1] * 4
    assert tasks["train"].name == "train 8 iterations, tiers every 1, 2, 4 steps"
    assert [r["step"] for r in read_metrics(run.metrics)] == [0, 2, 4, 6, 8]
    assert all("gradient_bytes" in record for record in read_metrics(run.metrics)[1:])
