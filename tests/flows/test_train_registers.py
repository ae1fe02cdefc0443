"""`train` registers and promotes by every value of `registry.promote`, as the flow does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.finetune import FinetuneParameters, finetune
from nested_core.data.example_digests import TrainedRows
from nested_core.pipeline import steps
from nested_core.registry import history, list_versions, read_champion
from nested_core.storage.adapter import read_adapter
from tests.builders.registering import promote, register
from tests.example import example_settings, train_example, write_config
from tests.flows.conftest import completed
from tests.left_out import needs_rooms

NAME = "capitals"
pytestmark = [
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.slow("trains two runs, and judges each as a command and as a flow"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that have ended: `better` was trained for longer than `worse`, on the same data."""
    folder = tmp_path_factory.mktemp("policies")
    for name, iters in (("worse", 4), ("better", 8)):
        done = train_example(folder / name, iters=iters)
        steps.judge(done.config, done.run)
    return folder


def settings(registry: Path, policy: str, iters: int) -> dict[str, Any]:
    target = {"path": str(registry), "name": NAME, "promote": policy}
    return {"registry": target, "iters": iters}


@pytest.mark.parametrize(
    ("policy", "run", "champion", "outcome"),
    [
        ("never", "better", None, None),
        ("always", "worse", "better", "promoted"),
        ("better", "better", "worse", "promoted"),
        ("better", "worse", "better", "is not better by more than 0.005 than the champion's"),
        pytest.param(
            *("approve", "better", None, "waiting for approval"), marks=needs_rooms("approval")
        ),
    ],
)
def test_train_does_with_a_verified_adapter_what_the_flow_does(
    trained: Path, tmp_path: Path, policy: str, run: str, champion: str | None, outcome: str | None
) -> None:
    before = None
    for side in ("train", "flow"):
        shutil.copytree(trained / run, tmp_path / side)
        if champion is not None:
            digest = json.loads((trained / champion / "dataset.json").read_bytes())["splits"]
            source = {"validation_digest": digest["valid"]["digest"]} | TrainedRows().to_json()
            before = register(trained / champion, tmp_path / f"{side}-registry", NAME, source)
            promote(tmp_path / f"{side}-registry", NAME, before, by="ann")
    iters = {"worse": 4, "better": 8}[run]
    config = write_config(
        tmp_path / "config.yaml", **settings(tmp_path / "train-registry", policy, iters)
    )
    arguments = ("-c", config, "--run-dir", tmp_path / "train", "--resume", "--json")
    done = completed("train", *arguments, cwd=tmp_path)
    assert done.code == 0, done.stderr
    values = example_settings(**settings(tmp_path / "flow-registry", policy, iters))
    state = finetune(
        FinetuneParameters(**values, run_dir=str(tmp_path / "flow"), resume=True), return_state=True
    )
    assert state.is_completed(), state.message

    version = read_adapter(tmp_path / "train" / "adapter").digest()
    assert done.document["version"] == version
    if outcome is None:
        assert done.document["promotion"] is None
    else:
        assert outcome in done.document["promotion"]
        assert outcome in str(state.message)
    for side in ("train", "flow"):
        registry = tmp_path / f"{side}-registry"
        assert version in list_versions(registry, NAME)
        assert read_champion(registry, NAME) == (version if outcome == "promoted" else before)
    actions = [
        [(entry["action"], entry["version"]) for entry in history(tmp_path / side, NAME)]
        for side in ("train-registry", "flow-registry")
    ]
    assert actions[0] == actions[1]
