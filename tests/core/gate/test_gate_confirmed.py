"""What promotes a run believes gate.json only where the files beside it bear it out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nested_core.errors import ConfigError, DamagedError, GateRejected
from nested_core.gate.checks.file_checks import CHECKS_OF_FILES
from nested_core.pipeline import steps
from nested_core.storage.manifest import read_manifest
from nested_core.storage.run_directory import RunDirectory
from tests.builders.adapter_folders import base_copy
from tests.builders.candidates import STEPS, Candidate, train_candidate
from tests.builders.registering import register
from tests.example import example_config

pytestmark = pytest.mark.slow("judges run after run")

CHECKPOINT = f"checkpoints/step-{STEPS:07d}"
ADAPTER = ("adapters.safetensors", "adapter_config.json")
FILES = (
    *("config.yaml", "dataset.json", "tiers.json", "plan.json", "metrics.jsonl", "result.json"),
    *("gate-losses.jsonl", "training-examples.json", "validation-losses.jsonl"),
    "sample-answers.jsonl",
    *(f"{folder}/{name}" for folder in ("initial", "adapter", CHECKPOINT) for name in ADAPTER),
    *(f"{CHECKPOINT}/{name}" for name in ("optimizer.safetensors", "state.json", "MANIFEST.json")),
)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


def test_a_run_without_the_losses_of_its_steps_is_not_judged_as_if_nothing_chose(judged) -> None:
    path = judged.run.validation_losses
    for lose in (lambda: path.write_text(""), path.unlink):
        lose()
        with pytest.raises(DamagedError, match=r"validation-losses\.jsonl .*not what training wr"):
            judged.judge()


def test_a_verdict_that_the_gate_gave_is_confirmed(judged: Candidate) -> None:
    judged.confirm()


def test_confirming_needs_no_trainer_and_neither_mlx_lm_nor_prefect() -> None:
    code = (
        "import sys, nested_core.gate.recheck, nested_core.registry.promotion_policy;"
        "unwanted = ('mlx_lm', 'transformers', 'prefect', 'polars', 'nested_core.training');"
        "sys.exit(', '.join(name for name in unwanted if name in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_passed_written_by_hand_over_an_untrained_adapter_is_damage(judged: Candidate) -> None:
    shutil.copytree(judged.run.initial, judged.run.adapter, dirs_exist_ok=True)
    initial = judged.gate["initial"]
    judged.edit_gate(trained=initial)
    judged.require_damaged("it has changed since")


def test_a_failed_run_is_not_saved_by_the_word_passed(judged: Candidate) -> None:
    judged = judged.bounded(min_relative_change=10.0)
    judged.require_rejected("unchanged")
    judged.edit_gate(verdict="passed")
    judged.require_damaged("says passed and gives reasons against it")
    judged.edit_gate(reasons=[])
    judged.require_damaged("says passed, and the files that it evaluated do not")


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
def test_a_verdict_on_something_else_is_damage(judged: Candidate, key: str, value: Any) -> None:
    judged.edit_gate(**{key: value})
    judged.require_damaged(f"not the verdict on the files beside it: {key} differ")


def test_a_bound_that_a_verdict_does_not_record_was_not_asked_for_then(judged: Candidate) -> None:
    recorded = judged.gate["thresholds"]
    del recorded["max_skipped_share"]
    judged.edit_gate(thresholds=recorded)
    judged.confirm()
    judged.bounded(max_skipped_share=0.5).require_damaged("thresholds differ")


def test_no_bound_that_is_left_out_keeps_promote_from_looking_for_a_change() -> None:
    left_out = [check.name for check in CHECKS_OF_FILES if check.bounds]
    assert left_out == ["enough change", "skipped updates"]


@pytest.mark.parametrize("key", ["min_relative_chance", "tasks_of_tomorrow"])
def test_a_bound_that_no_check_has_is_damage(judged: Candidate, key: str) -> None:
    recorded = judged.gate["thresholds"]
    judged.edit_gate(thresholds=recorded | {key: 0.5})
    judged.require_damaged("thresholds differ")


def test_a_report_on_other_data_is_damage_and_a_pipe_keeps_nobody_waiting(judged) -> None:
    edit(judged.run.dataset, digest="0" * 64)
    judged.require_damaged(r"dataset\.json is not the report on the data")
    for path in (judged.run.dataset, judged.run.gate):
        path.unlink()
        os.mkfifo(path)
        judged.require_damaged("is no")
        path.unlink()
        shutil.copyfile(judged.run.result, path)  # any JSON: gate.json is read first


@pytest.mark.parametrize("change", [lambda content: content + b" ", None], ids=["space", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_any_file_that_is_not_as_it_was_judged_is_damage(judged, name, change) -> None:
    path = judged.run.path / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    judged.require_damaged(re.escape(name.split("/")[0]))


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
def test_a_configuration_that_was_edited_after_the_verdict_is_damage(judged, values) -> None:
    edit_config(judged.run, values)
    judged.reread().require_damaged(r"gate\.json was not given on the config\.yaml that ")


def edit_config(run: RunDirectory, values: dict[str, Any]) -> None:
    run.config.write_text(yaml.safe_dump(yaml.safe_load(run.config.read_bytes()) | values))


def test_so_is_one_that_was_edited_between_training_and_the_verdict(candidate: Candidate) -> None:
    edit_config(candidate.run, {"learning_rate": 1.0})
    candidate.judge()
    candidate.reread().require_damaged(r"config\.yaml")


def test_a_digest_of_other_data_in_the_report_is_damage(judged: Candidate) -> None:
    splits = json.loads(judged.run.dataset.read_bytes())["splits"]
    splits["valid"]["digest"] = "0" * 64
    edit(judged.run.dataset, splits=splits)
    judged.require_damaged(r"was not given on the dataset\.json that ")


def test_a_verdict_of_an_earlier_version_has_to_be_given_again(judged: Candidate) -> None:
    judged.run.manifest.unlink()
    judged.require_damaged("is missing.*Run the gate again with --resume")
    judged.judge()
    judged.confirm()


def test_the_manifest_lists_all_that_the_verdict_rests_on(judged: Candidate) -> None:
    listed = read_manifest(judged.run.path)
    own = [name for name in FILES if name.startswith("checkpoints") and "MANIFEST" not in name]
    assert set(listed["files"]) == {"gate.json", *FILES} - set(own)
    assert listed["facts"] == {"kind": "verdict on a run", "verdict": "passed"}


@pytest.mark.parametrize("byte", range(0, 100, 7))
def test_one_changed_byte_of_the_verdict_or_its_manifest_is_damage(judged, byte) -> None:
    path = (judged.run.gate, judged.run.manifest)[byte % 2]
    content = bytearray(path.read_bytes())
    place = byte * len(content) // 100
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises((DamagedError, GateRejected), match=re.escape(path.name)):
        judged.confirm()


def test_a_verdict_that_was_edited_is_not_registered(judged: Candidate, tmp_path: Path) -> None:
    judged.run.gate.write_text(judged.run.gate.read_text().replace("/initial", "/another", 1))
    with pytest.raises(DamagedError, match=r"gate\.json has changed since the verdict was given"):
        register(judged.run.path, tmp_path / "registry", "capitals", {})
    judged.run.manifest.unlink()
    with pytest.raises(DamagedError, match=r"MANIFEST\.json is missing"):
        register(judged.run.path, tmp_path / "registry", "capitals", {})
    assert not (tmp_path / "registry").exists()


def test_norms_that_another_machine_rounds_otherwise_are_the_same(judged: Candidate) -> None:
    tensors = judged.gate["tensors"]
    for factor in (1.00001, 1.001):
        judged.edit_gate(
            tensors=[t | {"relative_delta": t["relative_delta"] * factor} for t in tensors]
        )
        if factor < 1.0001:
            judged.confirm()
    judged.require_damaged("tensors differ")


def test_a_resumption_under_other_bounds_needs_a_new_verdict_and_the_same_one_none(judged) -> None:
    steps.write_run_config(judged.config, judged.run, resume=True)
    judged.reread().confirm()
    other = judged.resumed(max_val_loss_increase=0.5)
    other.reread().require_damaged(r"config\.yaml.* Run the gate again with --resume")
    other.judge()
    other.reread().confirm()


@pytest.mark.slow("trains and judges a run of its own")
def test_another_template_or_tokenizer_than_was_trained_with_is_refused(tmp_path: Path) -> None:
    base = base_copy(tmp_path / "base")
    judged = train_candidate(tmp_path / "run", example_config(model=str(base)))
    judged.judge()
    judged.confirm()
    file = base / "tokenizer_config.json"
    kept = json.loads(file.read_bytes())
    file.write_text(json.dumps(kept | {"chat_template": kept["chat_template"] + " "}))
    with pytest.raises(ConfigError, match="another chat template"):
        judged.confirm()
    file.write_text(json.dumps(kept))
    judged.confirm()
    vocabulary = json.loads((base / "tokenizer.json").read_bytes())
    (base / "tokenizer.json").write_text(json.dumps(vocabulary, indent=1))
    with pytest.raises(ConfigError, match="another tokenizer"):
        judged.confirm()
