"""A run refused before its first step: nothing of it is left, and the same command begins anew."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from flows.commands.command_output import naming_report_of_failure
from nested_core.errors import ConfigError
from nested_core.storage.run_directory import RunDirectory
from tests.example import write_config
from tests.flows.conftest import called

REFUSED: dict[str, dict[str, Any]] = {
    "more layers than the model has": {"num_layers": 99},
    "a module that is not there": {"lora_parameters": {"keys": ["q_proj"]}},
    "an adapter to start from that is not there": {"resume_adapter_file": "nofile.safetensors"},
    "data that is not there": {"data": "nodata"},
    "data that is rejected": {"data": "data"},
    "a model that is no model": {"model": "empty"},
    "a tier that would never be trained": {"nested": {"frequencies": [1, 64]}},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED.keys())
def test_a_run_refused_before_its_first_step_leaves_nothing_but_what_was_there(
    tmp_path, changes
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    write_config(tmp_path / "lora.yaml", **changes)
    before = sorted(tmp_path.rglob("*"))
    rejects_data = changes.get("data") == "data"
    for place in ((), ("--run-dir", "runs/mine")):
        done = called("train", "-c", "lora.yaml", *place, cwd=tmp_path)
        assert done.code == (3 if rejects_data else 2)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow("trains and judges")
def test_the_same_command_works_once_the_mistake_is_corrected(tmp_path: Path) -> None:
    write_config(tmp_path / "lora.yaml", num_layers=99)
    arguments = ("train", "-c", "lora.yaml", "--run-dir", "mine/one")
    assert called(*arguments, cwd=tmp_path).code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["lora.yaml"]
    write_config(tmp_path / "lora.yaml", iters=8)
    assert called(*arguments, cwd=tmp_path).code != 2
    assert (tmp_path / "mine" / "one" / "result.json").is_file()


@pytest.mark.slow("trains")
def test_a_resume_that_is_refused_leaves_a_run_that_began_as_it_is(tmp_path: Path) -> None:
    write_config(tmp_path / "lora.yaml", iters=8)
    arguments = ("train", "-c", "lora.yaml", "--run-dir", "one")
    called(*arguments, cwd=tmp_path)
    files = set((tmp_path / "one").rglob("*"))
    assert tmp_path / "one" / "result.json" in files
    write_config(tmp_path / "lora.yaml", iters=8, num_layers=99)
    assert called(*arguments, "--resume", cwd=tmp_path).code == 2
    assert set((tmp_path / "one").rglob("*")) == files


def test_a_run_that_had_begun_to_train_stays_whatever_refuses_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with suppress(ConfigError), naming_report_of_failure(run):
        with run.locked():
            run.plan.write_text("{}")
        raise ConfigError("the registry is gone")
    assert run.plan.is_file()


def test_what_another_process_works_on_stays(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with ExitStack() as other:
        with suppress(ConfigError), naming_report_of_failure(run):
            other.enter_context(run.locked())
            run.config.write_text("model: other")
            raise ConfigError("in use")
        assert run.config.is_file()
