"""The flow from end to end on a real server: what it leaves behind, and how it fails."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from socket import gethostname
from typing import Any
from unittest.mock import patch

import pytest
from mlx.utils import tree_map_with_path
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)
from prefect.client.schemas.objects import State, StateType
from prefect.events.worker import EventsWorker

from flows.finetune import FinetuneParameters, finetune
from flows.flow_runs.run_place import FOLDER_LABEL, HOST_LABEL
from nested_core.errors import ConfigError, GateRejected, SilentUpdateWarning
from nested_core.pipeline import steps
from nested_core.registry import history, list_versions, read_champion
from nested_core.seams import is_there
from nested_core.storage.run_directory import RunDirectory
from nested_core.training import trainer
from tasks.prefect_server import read_events
from tests.builders.file_damage import flip_a_bit
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.example import DATA, example_settings
from tests.flows.conftest import flow_run_id, task_runs
from tests.left_out import needs_rooms
from tests.runs import judged_night
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_server")
TASKS = ("validate", "load", "train", "gate")
NIGHT = ("night",) if is_there("nights") else ()  # the page that the room publishes


def parameters(folder: Path, **changes: Any) -> FinetuneParameters:
    target = {"path": str(folder / "registry"), "name": "capitals", "promote": "always"}
    settings = {"iters": 8, "registry": target} | changes
    return FinetuneParameters.model_validate(
        example_settings(**settings) | {"run_dir": str(folder / "run")}
    )


def run_flow(given: FinetuneParameters) -> State[Any]:
    return finetune(given, return_state=True)


@pytest.fixture(scope="module")
def completed(prefect_server, tmp_path_factory) -> tuple[Path, State[Any]]:
    folder = tmp_path_factory.mktemp("flow")
    return folder, run_flow(parameters(folder))


def test_the_flow_completes_and_registers_a_champion(completed: tuple[Path, State[Any]]) -> None:
    folder, state = completed
    assert state.is_completed()
    champion = read_champion(folder / "registry", "capitals")
    (entry,) = history(folder / "registry", "capitals")
    assert entry["version"] == champion
    assert entry["previous"] is None
    adapter = folder / "registry" / "capitals" / "champion" / "adapters.safetensors"
    assert adapter.read_bytes() == (folder / "run" / "adapter" / adapter.name).read_bytes()


def test_the_flow_run_has_the_adapters_name_the_night_and_its_outcome(completed) -> None:
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(flow_run_id(completed[1]))
    due = run.expected_start_time
    assert due is not None
    assert run.name == f"capitals, {due.day} {due:%b %H:%M}"
    assert set(run.tags) >= {"capitals", "command"}
    assert (run.state_type, run.state_name) == (StateType.COMPLETED, "Promoted")


def test_the_flow_run_says_which_host_has_its_folder(completed: tuple[Path, State[Any]]) -> None:
    folder, state = completed
    with get_client(sync_client=True) as client:
        labels = client.read_flow_run(flow_run_id(state)).labels
    assert (labels[HOST_LABEL], labels[FOLDER_LABEL]) == (gethostname(), str(folder / "run"))


def continued(folder: Path, path: str, **changes: Any) -> State[Any]:
    """A run in `path` that starts from the champion, on data that it has not seen."""
    data = folder / "data"
    if not data.exists():
        shutil.copytree(DATA, data)
        lines = (DATA / "train.jsonl").read_text().splitlines(keepends=True)
        (data / "train.jsonl").write_text("".join(lines[:40]))
    following = {"from": "champion", "allow_high_rate": True}
    settings = {"continual": following, "data": str(data)} | changes
    given = parameters(folder, **settings).model_copy(update={"run_dir": str(folder / path)})
    return run_flow(given)


@needs_rooms("nights")
@pytest.mark.slow("a flow run of its own")
def test_a_sound_run_that_is_no_better_keeps_the_champion_and_is_told_as_unusual(
    completed: tuple[Path, State[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = completed
    champion = read_champion(folder / "registry", "capitals")
    worse = {"learning_rate": 0.17, "iters": 4, "gate": {"max_val_loss_increase": 1e3}}
    target = {"path": str(folder / "registry"), "name": "capitals", "promote": "better"}
    monkeypatch.chdir(folder)
    for day in range(1, 8):
        judged_night(Path("runs"), day, folder / "registry", "capitals", -0.5)
    state = continued(folder, "worse", registry=target, **worse)
    assert (state.is_completed(), state.name) == (True, "Kept the champion"), state.message
    asked = {"event": {"name": ["adapter.unusual"]}, "resource": {"id": ["adapter.capitals"]}}
    EventsWorker.drain_all()
    with get_client(sync_client=True) as client:
        wait_until(lambda: bool(read_events(client, 1, **asked)), "the unusual night's event")
        (event,) = read_events(client, 2, **asked)
    assert "The median of the last 7 nights is -0.5, and" in event["payload"]["message"]
    assert str(state.message).startswith(f"kept the champion {str(champion)[:12]}: loss ")
    assert read_champion(folder / "registry", "capitals") == champion
    assert list_versions(folder / "registry", "capitals") == [champion]


@pytest.mark.slow("a flow run of its own")
def test_a_rise_beyond_bound_and_noise_is_rejected_with_the_champions_loss(completed) -> None:
    folder, _ = completed
    champion = str(read_champion(folder / "registry", "capitals"))
    state = continued(folder, "rejected", learning_rate=0.17, iters=4)
    assert (state.is_failed(), state.name) == (True, "Rejected: worse"), state.message
    number = r"[0-9.]+"
    said = (
        rf"Rejected: worse \(loss_regressed: .+\); also examples_harmed; "
        rf"champion {champion[:12]} {number}, difference .+"
    )
    assert re.fullmatch(said, str(state.message))
    assert str(state.message).endswith("trained again until data, settings or champion change")
    again = continued(folder, "hopeless", learning_rate=0.17, iters=4)
    assert (again.is_completed(), again.name) == (True, "Skipped: hopeless")
    assert re.match(r"rejected as worse on .+ \(run rejected\): loss_regressed", str(again.message))
    assert tuple(task_runs(again, "validate")) == ("validate",)


@pytest.mark.slow("a flow run of its own")
def test_a_night_on_the_champions_own_data_is_skipped(completed: tuple[Path, State[Any]]) -> None:
    folder, _ = completed
    state = continued(folder, "skipped", data=str(DATA))
    champion = read_champion(folder / "registry", "capitals")
    assert (state.is_completed(), state.name) == (True, "Skipped: unchanged")
    assert state.message == f"data unchanged since {str(champion)[:12]}"


def test_what_cannot_be_used_in_the_end_fails_the_flow_before_there_is_a_run(tmp_path) -> None:
    state = run_flow(parameters(tmp_path, registry={"path": "/proc/x", "name": "capitals"}))
    assert (state.is_failed(), state.name) == (True, "Failed")
    assert "nothing can be written in /proc" in str(state.message)
    assert not (tmp_path / "run").exists()


def test_every_task_ran_once_and_in_order(completed: tuple[Path, State[Any]]) -> None:
    names = (*TASKS, "register")
    runs = task_runs(completed[1], *names)
    assert tuple(runs) == names
    assert [run.run_count for run in runs.values()] == [1] * len(names)
    assert all(run.state is not None and run.state.is_completed() for run in runs.values())


def test_the_flow_run_has_its_artifacts(completed: tuple[Path, State[Any]]) -> None:
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id(completed[1])]))
    with get_client(sync_client=True) as client:
        artifacts = {
            artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=wanted)
        }
    champion = ("champion",) if NIGHT else ()
    pages = ("dataset-report", "training-progress", "loss-curve", "gate-verdict", *champion, *NIGHT)
    assert set(artifacts) == {f"capitals-{page}" for page in pages}
    assert all(artifact.description for artifact in artifacts.values())
    verdict = str(artifacts["capitals-gate-verdict"].data)
    assert verdict.startswith("# Verified")
    tiers = [line.split("|")[1:-1] for line in verdict.splitlines()[-3:]]
    assert [int(tier[4]) for tier in tiers] == [8, 4, 2]
    for page in NIGHT:
        assert artifacts[f"capitals-{page}"].task_run_id is None  # V1 shows it above those of tasks


@pytest.mark.slow("a flow run of its own")
def test_a_second_flow_on_the_same_directory_is_refused(completed: tuple[Path, State[Any]]) -> None:
    folder, _ = completed
    state = run_flow(parameters(folder))
    assert state.is_failed()
    with pytest.raises(ConfigError, match="is not empty"):
        state.result()


def lose(model: Any, updates: dict[str, Any]) -> None:
    model.update(
        tree_map_with_path(
            lambda path, value: updates.get(".".join(path), value), model.trainable_parameters()
        )
    )


@pytest.fixture(scope="module")
def rejected(prefect_server, tmp_path_factory) -> tuple[Path, State[Any]]:
    """The flow where updates are computed and never reach the model."""
    folder = tmp_path_factory.mktemp("rejected")
    losing = patch.object(trainer, "apply_flat_updates_to_nested", lose)
    lost = pytest.warns(SilentUpdateWarning, match="are not in the model")
    unchanged = pytest.warns(SilentUpdateWarning, match="equals the initial adapter")
    with losing, lost, unchanged:
        return folder, run_flow(parameters(folder))


def test_a_failing_gate_fails_the_flow_with_its_reason_once_and_registers_nothing(rejected) -> None:
    folder, state = rejected
    assert state.is_failed()
    with get_client(sync_client=True) as client:
        stored = client.read_flow_run(flow_run_id(state)).state
    assert stored is not None
    assert (stored.type.value, stored.name) == ("FAILED", "Rejected: unchanged")
    assert str(stored.message).startswith("Rejected: unchanged (all 42 tensors")
    with pytest.raises(GateRejected, match="unchanged"):
        state.result()
    runs = task_runs(state, *TASKS)
    assert tuple(runs) == TASKS
    assert runs["gate"].run_count == 1
    assert not (folder / "registry").exists()
    verdict = json.loads((folder / "run" / "gate.json").read_bytes())
    assert [reason["code"] for reason in verdict["reasons"]] == ["unchanged"]


def test_a_data_set_with_an_error_fails_the_flow_before_training(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"messages": [}\n')
    state = run_flow(parameters(tmp_path, data=str(data)))
    assert state.is_failed()
    assert "train.jsonl:1" in str(state.message)
    runs = task_runs(state, "validate")
    assert [(name, run.run_count) for name, run in runs.items()] == [("validate", 1)]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "dataset.json",
        "report.html",
        "run.lock",
    ]
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id(state)]))
        keys = [artifact.key for artifact in client.read_artifacts(artifact_filter=wanted)]
    pages = ("dataset-report", *NIGHT)
    assert sorted(key for key in keys if key is not None) == [f"capitals-{page}" for page in pages]


@pytest.mark.slow("another flow run")
@needs_rooms("nights")
def test_an_error_that_is_not_ours_ends_the_page_of_the_night_too(tmp_path: Path) -> None:
    broken = patch.object(
        steps,
        "write_initial_adapter_and_tiers",
        side_effect=RuntimeError("the device fell off the bus"),
    )
    with broken:
        state = run_flow(parameters(tmp_path))
    assert (state.is_failed(), state.name) == (True, "Failed")
    wanted = ArtifactFilter(
        key=ArtifactFilterKey(any_=["capitals-night"]),
        flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id(state)]),
    )
    with get_client(sync_client=True) as client:
        (night,) = client.read_artifacts(artifact_filter=wanted)
    assert night.description == "Failed: RuntimeError: the device fell off the bus"
    assert "Running" not in str(night.data)


@pytest.mark.slow("a flow run of its own")
def test_a_full_disk_fails_the_flow_with_what_to_do(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/tiers.json")
    with patch.object(steps, "write_initial_adapter_and_tiers", side_effect=full):
        state = run_flow(parameters(tmp_path))
    assert state.is_failed()
    assert str(state.message).startswith("OSError: /runs/tiers.json cannot be written (No space")
    assert "Make room" in str(state.message)
    assert "Retry" in str(state.message)


@pytest.mark.slow("a flow run of its own")
def test_without_a_registry_the_flow_ends_after_the_gate(tmp_path: Path) -> None:
    given = parameters(tmp_path, iters=4, val_batches=1, registry={})
    state = run_flow(given)
    assert state.is_completed()
    assert tuple(task_runs(state, *TASKS)) == TASKS
    assert RunDirectory(tmp_path / "run").gate.is_file()


@pytest.mark.slow("a flow run of its own")
def test_a_run_whose_rival_is_damaged_fails_as_damaged_before_it_trains(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    version = register(write_run(tmp_path / "other", 1), registry, "capitals", {})
    promote(registry, "capitals", version, by="ann")
    weights = registry / "capitals" / "versions" / version / "adapters.safetensors"
    flip_a_bit(weights)
    state = run_flow(parameters(tmp_path))
    assert (state.is_failed(), state.name) == (True, "Damaged")
    assert "adapters.safetensors: has changed since it was written" in str(state.message)
    assert not (tmp_path / "run").exists()
