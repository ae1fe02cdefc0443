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
from nested_core.gate.file_checks import CHECKS_OF_FILES
from nested_core.pipeline import steps
from nested_core.pipeline.publishing import confirm_recorded_verdict
from nested_core.registry import register
from nested_core.storage.manifest import read_manifest
from nested_core.storage.run_directory import RunDirectory
from tests.core.gate.conftest import STEPS
from tests.gate_files import read_gate, write_gate

CHECKPOINT = f"checkpoints/step-{STEPS:07d}"
ADAPTER = ("adapters.safetensors", "adapter_config.json")
FILES = (
    *("config.yaml", "dataset.json", "tiers.json", "metrics.jsonl", "result.json"),
    *("gate-losses.jsonl", "training-examples.bin", "validation-losses.jsonl"),
    "sample-answers.jsonl",
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


def edit_bound(run: RunDirectory, **values: Any) -> None:
    """Edit gate.json as somebody would who makes a new manifest too."""
    gate = read_gate(run.gate)
    write_gate(run.path, gate | values, read_manifest(run.path)["files"])


def test_a_run_without_the_losses_of_its_steps_is_not_judged_as_if_nothing_chose(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    said = r"validation-losses\.jsonl .*not what training wrote"
    judged.validation_losses.write_text("")
    with pytest.raises(DamagedError, match=said):
        steps.judge(config, judged)
    judged.validation_losses.unlink()
    with pytest.raises(DamagedError, match=said):
        steps.judge(config, judged)


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
    edit_bound(judged, trained=initial)
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
    edit_bound(judged, verdict="passed")
    with pytest.raises(DamagedError, match="says passed and gives reasons against it"):
        confirm_recorded_verdict(bounds, judged)
    edit_bound(judged, reasons=[])
    with pytest.raises(DamagedError, match="says passed, and the files that it judged do not"):
        confirm_recorded_verdict(bounds, judged)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter_step", 4),
        ("tiers", []),
        ("tensors", []),
        ("thresholds", {"max_val_loss_increase": 9.0}),
        ("thresholds", None),
        ("thresholds", {}),
        ("initial", {"path": "initial", "digest": "0" * 64}),
    ],
)
def test_a_verdict_on_something_else_is_damage(
    judged: RunDirectory, config: FineTuneConfig, key: str, value: Any
) -> None:
    edit_bound(judged, **{key: value})
    with pytest.raises(DamagedError, match=f"not the verdict on the files beside it: {key} differ"):
        confirm_recorded_verdict(config, judged)


def test_a_bound_that_a_verdict_does_not_record_was_not_asked_for_then(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    recorded = json.loads(judged.gate.read_bytes())["thresholds"]
    del recorded["max_skipped_share"]
    edit_bound(judged, thresholds=recorded)
    confirm_recorded_verdict(config, judged)
    section = config.gate.model_copy(update={"max_skipped_share": 0.5})
    with pytest.raises(DamagedError, match="thresholds differ"):
        confirm_recorded_verdict(config.model_copy(update={"gate": section}), judged)


def test_no_bound_that_is_left_out_keeps_promote_from_looking_for_a_change() -> None:
    left_out = [check.name for check in CHECKS_OF_FILES if check.bounds]
    assert left_out == ["enough change", "skipped updates"]


@pytest.mark.parametrize("key", ["min_relative_chance", "tasks_of_tomorrow"])
def test_a_bound_that_no_check_has_is_damage(
    judged: RunDirectory, config: FineTuneConfig, key: str
) -> None:
    recorded = json.loads(judged.gate.read_bytes())["thresholds"]
    edit_bound(judged, thresholds=recorded | {key: 0.5})
    with pytest.raises(DamagedError, match="thresholds differ"):
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


def test_a_verdict_of_an_earlier_version_has_to_be_given_again(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    judged.manifest.unlink()
    with pytest.raises(
        DamagedError, match="is missing.*Judge the run again with --resume"
    ) as caught:
        confirm_recorded_verdict(config, judged)
    assert "\n" not in str(caught.value)
    steps.judge(config, judged)
    confirm_recorded_verdict(config, judged)


def test_the_manifest_lists_all_that_the_verdict_rests_on(judged: RunDirectory) -> None:
    listed = read_manifest(judged.path)
    own = [name for name in FILES if name.startswith("checkpoints") and "MANIFEST" not in name]
    assert set(listed["files"]) == {"gate.json", *FILES} - set(own)
    assert listed["facts"] == {"kind": "verdict on a run", "verdict": "passed"}


@pytest.mark.parametrize("byte", range(0, 100, 7))
def test_one_changed_byte_of_the_verdict_or_its_manifest_is_damage(
    judged: RunDirectory, config: FineTuneConfig, byte: int
) -> None:
    path = (judged.gate, judged.manifest)[byte % 2]
    content = bytearray(path.read_bytes())
    place = byte * len(content) // 100
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises((DamagedError, GateRejected), match=re.escape(path.name)):
        confirm_recorded_verdict(config, judged)


def test_a_verdict_that_was_edited_is_not_registered(judged: RunDirectory, tmp_path: Path) -> None:
    judged.gate.write_text(judged.gate.read_text().replace("/initial", "/another", 1))
    with pytest.raises(DamagedError, match=r"gate\.json has changed since the verdict was given"):
        register(judged.path, tmp_path / "registry", "capitals", {})
    judged.manifest.unlink()
    with pytest.raises(DamagedError, match=r"MANIFEST\.json is missing"):
        register(judged.path, tmp_path / "registry", "capitals", {})
    assert not (tmp_path / "registry").exists()


def test_norms_that_another_machine_rounds_otherwise_are_the_same(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    tensors = read_gate(judged.gate)["tensors"]
    edit_bound(
        judged, tensors=[t | {"relative_delta": t["relative_delta"] * 1.00001} for t in tensors]
    )
    confirm_recorded_verdict(config, judged)
    edit_bound(
        judged, tensors=[t | {"relative_delta": t["relative_delta"] * 1.001} for t in tensors]
    )
    with pytest.raises(DamagedError, match="tensors differ"):
        confirm_recorded_verdict(config, judged)


def test_a_resumption_under_other_bounds_needs_a_new_verdict_and_the_same_one_none(
    judged: RunDirectory, config: FineTuneConfig
) -> None:
    steps.write_run_config(config, judged, resume=True)
    confirm_recorded_verdict(read_run_config(judged), judged)
    bounds = config.gate.model_copy(update={"max_val_loss_increase": 0.5})
    other = config.model_copy(update={"gate": bounds})
    steps.write_run_config(other, judged, resume=True)
    with pytest.raises(DamagedError, match=r"config\.yaml.* Judge the run again with --resume"):
        confirm_recorded_verdict(read_run_config(judged), judged)
    steps.judge(other, judged)
    confirm_recorded_verdict(read_run_config(judged), judged)
