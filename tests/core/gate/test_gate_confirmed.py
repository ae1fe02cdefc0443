"""What promotes a run believes gate.json only where the files beside it bear it out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nested_core import pipeline
from nested_core.config import FineTuneConfig
from nested_core.errors import DamagedError, GateRejected
from nested_core.publishing import confirm_verdict
from nested_core.run_directory import RunDirectory


@pytest.fixture
def judged(run: RunDirectory, config: FineTuneConfig) -> RunDirectory:
    pipeline.judge(config, run)
    return run


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


def test_a_verdict_that_the_gate_gave_is_confirmed(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    confirm_verdict(config, judged)


def test_a_passed_written_by_hand_over_an_untrained_adapter_is_damage(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    shutil.copytree(judged.initial, judged.adapter, dirs_exist_ok=True)
    initial = json.loads(judged.gate.read_bytes())["initial"]
    edit(judged.gate, trained=initial)
    with pytest.raises(DamagedError, match="it has changed since"):
        confirm_verdict(config, judged)


def test_a_failed_run_is_not_saved_by_the_word_passed(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    bounds = config.model_copy(
        update={"gate": config.gate.model_copy(update={"min_relative_change": 10.0})}
    )
    with pytest.raises(GateRejected):
        pipeline.judge(bounds, judged)
    edit(judged.gate, verdict="passed")
    with pytest.raises(DamagedError, match="says passed and gives reasons against it"):
        confirm_verdict(bounds, judged)
    edit(judged.gate, reasons=[])
    with pytest.raises(DamagedError, match="says passed, and the files that it judged do not"):
        confirm_verdict(bounds, judged)


@pytest.mark.parametrize(
    ("key", "value"), [("adapter_step", 4), ("tiers", []), ("initial", {"digest": "0" * 64})]
)
def test_a_verdict_on_something_else_is_damage(
    judged: RunDirectory, config: FineTuneConfig, key: str, value: Any
) -> None:
    edit(judged.gate, **{key: value})
    with pytest.raises(DamagedError, match=f"not the verdict on the files beside it: {key} differ"):
        confirm_verdict(config, judged)


def test_a_report_on_other_data_is_damage_and_a_pipe_keeps_nobody_waiting(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    edit(judged.dataset, digest="0" * 64)
    with pytest.raises(DamagedError, match=r"dataset\.json is not the report on the data"):
        confirm_verdict(config, judged)
    for path in (judged.dataset, judged.gate):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DamagedError, match="is no"):
            confirm_verdict(config, judged)
        path.unlink()
        shutil.copyfile(judged.result, path)  # any JSON: gate.json is read first
