"""What promotes a run believes gate.json only where the files beside it bear it out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DamagedError, GateRejected
from nested_core.pipeline import steps
from nested_core.pipeline.publishing import confirm_recorded_verdict
from nested_core.storage.run_directory import RunDirectory
from tests.core.gate.conftest import STEPS

CHECKPOINT = f"checkpoints/step-{STEPS:07d}"
ADAPTER = ("adapters.safetensors", "adapter_config.json")
FILES = (
    *("config.yaml", "dataset.json", "tiers.json", "metrics.jsonl", "result.json"),
    *(f"{folder}/{name}" for folder in ("initial", "adapter", CHECKPOINT) for name in ADAPTER),
    *(f"{CHECKPOINT}/{name}" for name in ("optimizer.safetensors", "state.json", "MANIFEST.json")),
)


@pytest.fixture(scope="module")
def passed(
    finished: tuple[FineTuneConfig, RunDirectory], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The finished run with its verdict."""
    config, done = finished
    path = tmp_path_factory.mktemp("judged") / "run"
    shutil.copytree(done.path, path)
    steps.judge(config, RunDirectory(path))
    return path


@pytest.fixture
def judged(passed: Path, tmp_path: Path) -> RunDirectory:
    """A copy of it that a test may tamper with."""
    return RunDirectory(Path(shutil.copytree(passed, tmp_path / "judged")))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


def test_a_verdict_that_the_gate_gave_is_confirmed(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    confirm_recorded_verdict(config, judged)


def test_confirming_needs_no_trainer_and_neither_mlx_lm_nor_prefect() -> None:
    code = (
        "import sys, nested_core.gate, nested_core.registry.promotion_policy;"
        "unwanted = ('mlx_lm', 'transformers', 'prefect', 'polars', 'nested_core.training');"
        "sys.exit(', '.join(name for name in unwanted if name in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_passed_written_by_hand_over_an_untrained_adapter_is_damage(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    shutil.copytree(judged.initial, judged.adapter, dirs_exist_ok=True)
    initial = json.loads(judged.gate.read_bytes())["initial"]
    edit(judged.gate, trained=initial)
    with pytest.raises(DamagedError, match="it has changed since"):
        confirm_recorded_verdict(config, judged)


def test_a_failed_run_is_not_saved_by_the_word_passed(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    bounds = config.model_copy(
        update={"gate": config.gate.model_copy(update={"min_relative_change": 10.0})}
    )
    with pytest.raises(GateRejected):
        steps.judge(bounds, judged)
    edit(judged.gate, verdict="passed")
    with pytest.raises(DamagedError, match="says passed and gives reasons against it"):
        confirm_recorded_verdict(bounds, judged)
    edit(judged.gate, reasons=[])
    with pytest.raises(DamagedError, match="says passed, and the files that it judged do not"):
        confirm_recorded_verdict(bounds, judged)


@pytest.mark.parametrize(
    ("key", "value"), [("adapter_step", 4), ("tiers", []), ("initial", {"digest": "0" * 64})]
)
def test_a_verdict_on_something_else_is_damage(
    judged: RunDirectory, config: FineTuneConfig, key: str, value: Any
) -> None:
    edit(judged.gate, **{key: value})
    with pytest.raises(DamagedError, match=f"not the verdict on the files beside it: {key} differ"):
        confirm_recorded_verdict(config, judged)


def test_a_report_on_other_data_is_damage_and_a_pipe_keeps_nobody_waiting(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    edit(judged.dataset, digest="0" * 64)
    with pytest.raises(DamagedError, match=r"dataset\.json is not the report on the data"):
        confirm_recorded_verdict(config, judged)
    for path in (judged.dataset, judged.gate):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DamagedError, match="is no"):
            confirm_recorded_verdict(config, judged)
        path.unlink()
        shutil.copyfile(judged.result, path)  # any JSON: gate.json is read first


@pytest.mark.parametrize("change", [lambda content: content + b" ", None], ids=["space", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_any_file_that_is_not_as_it_was_judged_is_damage(
    judged: RunDirectory, config: FineTuneConfig, name: str, change: Callable[[bytes], bytes] | None
) -> None:
    path = judged.path / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DamagedError, match=re.escape(name.split("/")[0])) as caught:
        confirm_recorded_verdict(config, judged)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 1.0},
        {"seed": 9},
        {"data": "elsewhere"},
        {"gate": {"max_val_loss_increase": 9.0}},
        {"registry": {"promote": "always", "path": "registry", "name": "capitals"}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_configuration_that_was_edited_after_the_verdict_is_damage(
    judged: RunDirectory, values: dict[str, Any]
) -> None:
    edit_config(judged, values)
    with pytest.raises(DamagedError, match=r"gate\.json was not given on the config\.yaml that "):
        confirm_recorded_verdict(read_run_config(judged), judged)


def edit_config(run: RunDirectory, values: dict[str, Any]) -> None:
    run.config.write_text(yaml.safe_dump(yaml.safe_load(run.config.read_bytes()) | values))


def test_so_is_one_that_was_edited_between_training_and_the_verdict(
    run: RunDirectory, config: FineTuneConfig
) -> None:
    edit_config(run, {"learning_rate": 1.0})
    steps.judge(config, run)
    with pytest.raises(DamagedError, match=r"config\.yaml"):
        confirm_recorded_verdict(read_run_config(run), run)


def test_a_digest_of_other_data_in_the_report_is_damage(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    splits = json.loads(judged.dataset.read_bytes())["splits"]
    splits["valid"]["digest"] = "0" * 64
    edit(judged.dataset, splits=splits)
    with pytest.raises(DamagedError, match=r"was not given on the dataset\.json that "):
        confirm_recorded_verdict(config, judged)


def test_a_verdict_without_digests_of_what_it_judged_is_damage(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    edit(judged.gate, evidence=None)
    with pytest.raises(DamagedError, match=r"config\.yaml and dataset\.json and result\.json"):
        confirm_recorded_verdict(config, judged)


def test_a_resumption_under_other_bounds_needs_a_new_verdict_and_the_same_one_none(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    steps.begin(config, judged, resume=True)
    confirm_recorded_verdict(read_run_config(judged), judged)
    bounds = config.gate.model_copy(update={"max_val_loss_increase": 0.5})
    other = config.model_copy(update={"gate": bounds})
    steps.begin(other, judged, resume=True)
    with pytest.raises(DamagedError, match=r"config\.yaml.* judge the run again with --resume"):
        confirm_recorded_verdict(read_run_config(judged), judged)
    steps.judge(other, judged)
    confirm_recorded_verdict(read_run_config(judged), judged)
