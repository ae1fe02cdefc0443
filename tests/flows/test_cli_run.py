"""`run`: the flow from the command line, against a real server named by PREFECT_API_URL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import get_current_settings

from tests.example import write_config
from tests.flows.conftest import Ended, called, completed

pytestmark = pytest.mark.slow("runs the pipeline by its command")


@dataclass(frozen=True)
class Runs:
    folder: Path
    sound: Ended
    bad_data: Ended

    def flow_run(self, run_dir: str) -> FlowRun:
        with get_client(sync_client=True) as client:
            found: list[FlowRun] = client.read_flow_runs()
        wanted = str(self.folder.name)
        (run,) = [
            run
            for run in found
            if wanted in str(run.parameters) and f"'run_dir': '{run_dir}'" in str(run.parameters)
        ]
        return run


@pytest.fixture(scope="module")
def runs(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A sound data set, and in a process of its own a bad one, on one server."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text('{"messages": 5}\n')
    registry = {"path": str(folder / "registry"), "name": "capitals"}
    changes = {"iters": 4, "val_batches": 1, "registry": registry}
    write_config(folder / "sound.yaml", **changes)
    write_config(folder / "bad.yaml", data="data", **changes)
    sound = ("run", "-c", "sound.yaml", "--run-dir", "sound")
    bad = ("run", "-c", "bad.yaml", "--run-dir", "bad")
    server = str(get_current_settings().api.url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", server)
        ended = called(*sound, cwd=folder)
    return Runs(folder, ended, completed(*bad, cwd=folder, PREFECT_API_URL=server))


def test_a_run_prints_its_adapter_and_registers_without_promoting(runs: Runs) -> None:
    assert runs.sound.code == 0, runs.sound.stderr
    assert runs.sound.stdout == "adapter: sound/adapter\n"
    (version,) = (runs.folder / "registry" / "capitals" / "versions").iterdir()
    assert len(version.name) == 64
    assert not (runs.folder / "registry" / "capitals" / "champion").exists()
    state = runs.flow_run("sound").state
    assert state is not None
    assert state.name == "Verified"


def test_a_run_on_bad_data_exits_3_with_the_line_and_its_flow_run_is_failed(runs: Runs) -> None:
    assert runs.bad_data.code == 3
    assert "train.jsonl:1: " in runs.bad_data.message()
    assert runs.bad_data.stderr.count(" wrong-type") == 1
    ended = r"Task run 'validate data' - Finished in state Failed$"
    assert re.search(ended, runs.bad_data.stderr, re.M)
    state = runs.flow_run("bad").state
    assert state is not None
    assert state.name == "Failed: data"
    assert "train.jsonl:1: " in str(state.message)
