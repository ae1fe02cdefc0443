"""A run refused before its first step: nothing is left, unless a person named its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nested_core.report.run_page import read_report
from tests.example import write_config
from tests.flows.conftest import called

REFUSED: dict[str, dict[str, Any]] = {
    "more layers than the model has": {"num_layers": 99},
    "a module that is not there": {"lora_parameters": {"keys": ["q_proj"]}},
    "an adapter to start from that is not there": {"resume_adapter_file": "nofile.safetensors"},
    "data that is not there": {"data": "nodata"},
    "a model that is no model": {"model": "empty"},
    "a tier that would never be trained": {"nested": {"frequencies": [1, 64]}},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED.keys())
def test_a_run_refused_before_its_first_step_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "empty").mkdir()
    write_config(tmp_path / "lora.yaml", **changes)
    done = called("train", "-c", "lora.yaml", cwd=tmp_path)
    assert done.code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "lora.yaml"]


def test_other_runs_stay(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    write_config(tmp_path / "lora.yaml", num_layers=99)
    assert called("train", "-c", "lora.yaml", cwd=tmp_path).code == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]


def test_a_folder_that_a_person_named_stays_and_never_began(tmp_path: Path) -> None:
    write_config(tmp_path / "lora.yaml", num_layers=99)
    assert called("train", "-c", "lora.yaml", "--run-dir", "runs/one", cwd=tmp_path).code == 2
    listed = called("runs", "--json", cwd=tmp_path)
    (row,) = json.loads(listed.stdout)["runs"]
    assert (row["state"], row["step"]) == ("never began", 0)
    assert "Never began: " in read_report(tmp_path / "runs" / "one").to_html()


def test_a_rejected_data_set_keeps_its_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    write_config(tmp_path / "lora.yaml", data="data")
    assert called("train", "-c", "lora.yaml", cwd=tmp_path).code == 3
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "dataset.json").is_file()
