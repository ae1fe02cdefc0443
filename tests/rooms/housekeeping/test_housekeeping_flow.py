"""The flow `housekeeping`, and what a real run and its version are good for afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flows.rooms.housekeeping.flow import HousekeepingParameters, housekeeping
from nested_core import registry as core
from nested_core.pipeline import steps
from nested_core.storage.checkpoint_verification import list_checkpoints
from nested_core.storage.run_directory import RunDirectory
from tests.example import train_example
from tests.flows.conftest import called
from tests.left_out import needs_rooms

NAME = "capitals"


@pytest.mark.slow("trains, and judges twice")
@needs_rooms("doctor")
@pytest.mark.usefixtures("prefect_server")
def test_a_pruned_run_restores_its_version_and_is_judged_again_and_the_state_has_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"path": "registry", "name": NAME}
    saves = {"save_every": 2, "steps_per_eval": 2}
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs" / "20260901T020000Z-00000001"
    made = train_example(path, iters=8, registry=section, **saves)
    steps.judge(made.config, made.run)
    assert called("promote", path, "--name", NAME, cwd=tmp_path).code == 0
    champion = str(core.read_champion(Path("registry"), NAME))
    assert len(list_checkpoints(made.run.checkpoints)) == 4

    values = {"registry": "registry", "name": NAME, "keep_runs": 0}
    parameters = HousekeepingParameters.model_validate(values)
    state = housekeeping(parameters, return_state=True)
    assert state.is_completed(), state.message
    before, after = str(state.message).split("; ")[0].split(", ")
    assert (before.endswith(" before"), after.endswith(" after")) == (True, True)
    left = {path.name for path in list_checkpoints(made.run.checkpoints)}
    assert left == {f"step-{made.result.adapter_step:07}", "step-0000008"}
    spare = 4 - len(left)
    assert f"removed: 0 runs and {spare} spare checkpoints of others (" in str(state.message)

    shutil.rmtree(tmp_path / "registry" / NAME / "versions" / champion)
    damaged = housekeeping(parameters, return_state=True)
    assert (damaged.name, damaged.is_failed()) == ("Damaged", True)
    assert path.exists()
    called("rollback", NAME, cwd=tmp_path)
    restored = called("promote", path, "--name", NAME, cwd=tmp_path)
    assert restored.code == 0, restored.stderr
    assert core.read_champion(Path("registry"), NAME) == champion
    judged = called(
        "train", "-c", path / "config.yaml", "--run-dir", path, "--resume", cwd=tmp_path
    )
    assert judged.code == 0, judged.stderr
    assert json.loads((path / "gate.json").read_text())["verdict"] == "passed"
    assert RunDirectory(path).result.exists()
