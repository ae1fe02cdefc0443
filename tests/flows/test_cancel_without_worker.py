"""A cancel of which no worker hears: the training asks by itself, and ends with a checkpoint."""

from __future__ import annotations

import threading
from contextvars import copy_context
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.states import Cancelled, Cancelling, State

from flows.finetune import FinetuneParameters, finetune
from nested_core.storage.checkpoint import latest_checkpoint
from nested_core.storage.run_directory import RunDirectory
from tests.example import example_settings
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_server")
STEPS = 1000


def cancel_once_it_trains(run: RunDirectory, tag: str, state: State[None]) -> None:
    """What a person's Cancel does on the server, or the server itself after five minutes of it."""
    wait_until(
        lambda: run.checkpoints.exists() and latest_checkpoint(run.checkpoints) is not None,
        "a checkpoint",
    )
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))
        (flow_run,) = client.read_flow_runs(flow_run_filter=wanted)
        client.set_flow_run_state(flow_run.id, state)


@pytest.mark.parametrize(
    "state",
    [pytest.param(Cancelling(), marks=pytest.mark.slow("trains another run")), Cancelled()],
    ids=lambda state: str(state.name),
)
def test_a_training_that_is_cancelled_on_the_server_alone_ends_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_name: str, state: State[None]
) -> None:
    monkeypatch.setattr("tasks.training_progress.SECONDS_BETWEEN_CANCEL_CHECKS", 0.2)
    run = RunDirectory(tmp_path / "run")
    settings = example_settings(
        iters=STEPS,
        save_every=2,
        steps_per_report=1,
        steps_per_eval=STEPS,
        registry={"path": str(tmp_path / "registry"), "name": new_name, "promote": "never"},
    )
    given = FinetuneParameters.model_validate(settings | {"run_dir": str(run.path)})
    person = threading.Thread(
        target=copy_context().run, args=(cancel_once_it_trains, run, new_name, state)
    )
    person.start()
    ended = finetune(given, return_state=True)
    person.join()
    assert ended.is_cancelled()
    checkpoint = latest_checkpoint(run.checkpoints)
    assert checkpoint is not None
    assert checkpoint.step < STEPS
    assert not run.result.exists()
