"""A run whose folder was changed after training: damage, never a verdict; and its data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import DataPolicy
from nested_core.errors import DamagedError, DatasetError, GateRejected
from nested_core.gate import judge_run
from nested_core.gate.run_evidence import collect_evidence
from nested_core.pipeline import steps
from nested_core.storage.checkpoint_verification import checkpoint_path
from nested_core.storage.run_directory import RunDirectory
from tests.core.gate.conftest import STEPS
from tests.example import prepare, train


def overwritten_initial(run: RunDirectory) -> None:
    source = checkpoint_path(run.checkpoints, STEPS) / "adapters.safetensors"
    shutil.copyfile(source, run.initial / "adapters.safetensors")


def tampered_adapter(run: RunDirectory) -> None:
    path = run.adapter / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def swapped_tiers(run: RunDirectory) -> None:
    tiers = json.loads(run.tiers.read_bytes())
    tiers["tensors"] = {name: 2 - tier for name, tier in tiers["tensors"].items()}
    run.tiers.write_text(json.dumps(tiers))


def changed_frequencies(run: RunDirectory) -> None:
    tiers = json.loads(run.tiers.read_bytes())
    run.tiers.write_text(json.dumps(tiers | {"frequencies": [1, 2, 8]}))


def edited_state(run: RunDirectory) -> None:
    path = checkpoint_path(run.checkpoints, STEPS) / "state.json"
    path.write_text(path.read_text().replace('"updates": 4', '"updates": 5'))


def truncated_adapter(run: RunDirectory) -> None:
    path = run.adapter / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


TAMPERED: list[tuple[Callable[[RunDirectory], None], str]] = [
    (overwritten_initial, "initial is not the adapter that training began from"),
    (tampered_adapter, "it has changed since"),
    (swapped_tiers, "tiers.json has changed since training began"),
    (changed_frequencies, "tiers.json has changed since training began"),
    (edited_state, "state.json has changed since it was written"),
    (truncated_adapter, "changed since. Copy .* from the checkpoint back into it."),
]


@pytest.mark.parametrize(
    ("tamper", "message"), TAMPERED, ids=[tamper.__name__ for tamper, _ in TAMPERED]
)
def test_a_run_that_was_tampered_with_is_damage(
    config: FineTuneConfig,
    run: RunDirectory,
    tamper: Callable[[RunDirectory], None],
    message: str,
) -> None:
    tamper(run)
    with pytest.raises(DamagedError, match=message):
        steps.judge(config, run)
    assert not run.gate.exists()


def test_the_report_on_a_large_data_set_is_read_whatever_its_size(run: RunDirectory) -> None:
    """449,000 duplicates made dataset.json 72 MiB; the gate refused what it had written itself."""
    report = json.loads(run.dataset.read_bytes())
    run.dataset.write_text(json.dumps(report | {"padding": "x" * (72 * 1024 * 1024)}))
    assert collect_evidence(run).checkpoint.step == STEPS


def test_a_test_set_is_judged_on_where_there_is_one(config: FineTuneConfig, tmp_path: Path) -> None:
    data = shutil.copytree(config.data, tmp_path / "data")
    asked = {"role": "user", "content": "I want to see France. Where to?"}
    answered = {"role": "assistant", "content": "Go to Paris, the capital of France!"}
    (data / "test.jsonl").write_text(json.dumps({"messages": [asked, answered]}) + "\n")
    with_test_set = config.model_copy(update={"data": str(data)})
    done = train(with_test_set, prepare(with_test_set, tmp_path / "run"))
    verdict = judge_run(with_test_set, done.run)
    assert verdict.validation is not None
    assert verdict.validation.selected_on_same_data is False


@pytest.mark.slow("trains and judges a run of its own")
def test_a_test_set_that_repeats_the_validation_set_counts_as_selected_on(
    config: FineTuneConfig, tmp_path: Path
) -> None:
    data = shutil.copytree(config.data, tmp_path / "data")
    shutil.copy(data / "valid.jsonl", data / "test.jsonl")
    repeated = config.model_copy(
        update={"data": str(data), "data_policy": DataPolicy(leakage="drop")}
    )
    done = train(repeated, prepare(repeated, tmp_path / "run"))
    verdict = judge_run(repeated, done.run)
    assert verdict.validation is not None
    assert verdict.validation.selected_on_same_data is True


def test_the_data_that_are_judged_on_are_those_that_were_validated(
    config: FineTuneConfig, run: RunDirectory
) -> None:
    valid = Path(config.data) / "valid.jsonl"
    lines = valid.read_bytes()
    valid.write_bytes(lines.splitlines(keepends=True)[0])
    try:
        with pytest.raises((DatasetError, DamagedError, GateRejected), match="data"):
            steps.judge(config, run)
    finally:
        valid.write_bytes(lines)
