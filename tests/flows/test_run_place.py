"""A run that is tried again on another host than it began on: it says where its folder is."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.flow_engine import run_flow_sync
from prefect.states import Pending
from prefect.types import KeyValueLabels

from flows.finetune import finetune
from flows.flow_runs.run_place import FOLDER_LABEL, HOST_LABEL
from tests.example import example_settings
from tests.left_out import slow_except

pytestmark = pytest.mark.usefixtures("prefect_server")


def run_begun_on(host: str, folder: Path, config: dict[str, object]) -> State[None]:
    """The end of a flow run whose labels say that a host has its folder."""
    with get_client(sync_client=True) as client:
        flow_run = client.create_flow_run(finetune, parameters={"config": config}, state=Pending())
        labels: KeyValueLabels = {HOST_LABEL: host, FOLDER_LABEL: str(folder)}
        client.update_flow_run_labels(flow_run.id, labels)
        flow_run = client.read_flow_run(flow_run.id)
    ended = run_flow_sync(finetune, flow_run, {"config": config}, return_type="state")
    assert isinstance(ended, State)
    return ended


@pytest.mark.parametrize("run_dir", slow_except(["run", None], "run", reason="another flow run"))
def test_a_run_whose_folder_is_on_another_host_trains_nothing_and_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run_begun_on("host-a", tmp_path / "run", example_settings() | {"run_dir": run_dir})
    assert (ended.is_failed(), ended.name) == (True, "Failed")
    said = str(ended.message)
    assert f"began on the host host-a, which has its folder {tmp_path}/run" in said
    assert f"{socket.gethostname()} has no such folder" in said
    assert f"rsync -a host-a:{tmp_path}/run/ {tmp_path}/run/" in said
    assert not list(tmp_path.iterdir())


def test_a_run_that_began_on_this_host_begins_anew_where_its_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    unusable = example_settings(registry={"path": "/proc/x", "name": "capitals"})
    ended = run_begun_on(socket.gethostname(), tmp_path / "gone", unusable)
    assert "nothing can be written in /proc" in str(ended.message)  # it looks where it will write
