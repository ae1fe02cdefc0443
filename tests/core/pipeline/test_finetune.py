"""`finetune` from Python: the whole sequence, its hooks, and the GPU that its steps hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DatasetError, GateRejected
from nested_core.pipeline import steps
from nested_core.pipeline.device_lock import DEVICE_LOCK_VARIABLE
from nested_core.pipeline.finetune import finetune
from nested_core.pipeline.hooks import Steps
from nested_core.registry import read_champion
from nested_core.storage.run_directory import RunDirectory, open_run
from tests.core.pipeline.test_device_lock import HOLD
from tests.example import DATA, example_config


class Recording(Steps):
    """Notes which steps ran, in their order."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name in ("begin", "validate", "load", "train", "judge", "register"):
            self.called.append(name)
        return super().__getattribute__(name)


def registered(tmp_path: Path, promote: str = "always", **changes: Any) -> FineTuneConfig:
    registry = {"path": str(tmp_path / "registry"), "name": "capitals", "promote": promote}
    return example_config(iters=4, registry=registry, **changes)


def data_with_a_test_set(folder: Path) -> str:
    """The example's training set, of which the last examples are the test set."""
    lines = (DATA / "train.jsonl").read_text().splitlines(keepends=True)
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(lines[:-8]))
    (folder / "test.jsonl").write_text("".join(lines[-8:]))
    return str(folder)


def test_a_fine_tune_from_python_trains_judges_registers_and_promotes(tmp_path: Path) -> None:
    hooks = Recording()
    result = finetune(registered(tmp_path), open_run(tmp_path / "run"), hooks)
    assert hooks.called == ["begin", "validate", "load", "train", "judge", "register"]
    assert result.verdict is not None
    assert result.verdict.summary().startswith("passed, better loss; no questions asked: ")
    assert result.training is not None
    assert result.training.step == 4
    assert (result.promotion, result.test_loss, result.skipped) == ("promoted", None, None)
    assert read_champion(tmp_path / "registry", "capitals") == result.version
    assert json.loads(result.run.gate.read_bytes())["trained"]["digest"] == result.version
    assert "Promoted: passed, better" in result.run.report.read_text()
    assert "Promoted: passed, better" in result._repr_html_()


@pytest.mark.slow("trains and judges")
def test_a_version_that_is_not_to_be_promoted_is_registered_alone(tmp_path: Path) -> None:
    result = finetune(registered(tmp_path, "never", val_batches=0), open_run(tmp_path / "run"))
    assert result.version is not None
    assert result.promotion is None
    assert result.decision is not None
    assert result.decision.outcome == "registered"
    assert read_champion(tmp_path / "registry", "capitals") is None


@pytest.mark.slow("trains and judges")
def test_without_a_registry_nothing_is_registered(tmp_path: Path) -> None:
    hooks = Recording()
    config = example_config(iters=4, data=data_with_a_test_set(tmp_path / "data"), test=True)
    result = finetune(config, open_run(tmp_path / "run"), hooks)
    assert hooks.called[-1] == "judge"
    assert (result.version, result.promotion) == (None, None)
    assert result.test_loss is not None
    assert result.test_loss.mean is not None
    assert result.test_loss.mean > 0


def test_a_test_set_that_is_asked_for_and_missing_is_told_before_training(tmp_path: Path) -> None:
    hooks = Recording()
    with pytest.raises(DatasetError, match=r"test: .* has no test.jsonl, or it is empty"):
        finetune(example_config(iters=4, test=True), open_run(tmp_path / "run"), hooks)
    assert hooks.called == ["begin", "validate"]


@pytest.mark.slow("trains and judges a run of its own")
def test_a_rejected_adapter_is_not_registered(tmp_path: Path) -> None:
    hooks = Recording()
    config = registered(tmp_path, gate={"min_relative_change": 1.5})
    with pytest.raises(GateRejected, match="The gate rejected"):
        finetune(config, open_run(tmp_path / "run"), hooks)
    assert hooks.called[-1] == "judge"
    assert not (tmp_path / "registry").exists()


def run_while_the_device_is_held(step: Callable[[Callable[[str], None]], object]) -> list[str]:
    """Run a step while another process holds the device; that one ends when it is waited for."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    messages: list[str] = []

    def on_wait(message: str) -> None:
        messages.append(message)
        holder.kill()

    try:
        step(on_wait)
    finally:
        holder.kill()
        holder.communicate()
    named = f"device test-device is in use by process {holder.pid}: waiting until it is free"
    assert messages == [named]
    return messages


@pytest.mark.slow("trains and judges a run of its own")
def test_every_step_that_computes_waits_for_the_device(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(DEVICE_LOCK_VARIABLE, "test-device")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    nested = {"frequencies": [1, 2], "strategy": "parameter_importance", "probe_batches": 1}
    data = data_with_a_test_set(tmp_path / "data")
    config = example_config(iters=4, data=data, nested=nested)
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        steps.write_run_config(config, run, resume=False)
        steps.validate(config, run)
        run_while_the_device_is_held(
            lambda wait: steps.write_initial_adapter_and_tiers(config, run, on_wait=wait)
        )
        run_while_the_device_is_held(lambda wait: steps.train(config, run, on_wait=wait))
        run_while_the_device_is_held(lambda wait: steps.judge(config, run, on_wait=wait))
        run_while_the_device_is_held(lambda wait: steps.measure_test(config, run, on_wait=wait))
    assert os.environ[DEVICE_LOCK_VARIABLE] == "test-device"
