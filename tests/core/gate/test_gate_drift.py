"""How far predictions move is measured on the held-out examples, recorded and bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.config.loading import parse_config
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection, RegistrySection
from nested_core.errors import ConfigError, DamagedError, DatasetError, GateRejected
from nested_core.gate import judge_run
from nested_core.gate.example_losses import read_example_losses
from nested_core.gate.loss_figures import summarise_drift
from nested_core.pipeline import steps
from nested_core.pipeline.publishing import confirm_recorded_verdict, make_provenance
from nested_core.records.verdict_file import (
    read_verdict,
)
from nested_core.registry.registration import read_passed_run
from nested_core.storage.run_directory import RunDirectory
from tests.core.gate.test_gate_tasks import bind_again
from tests.example import DATA, example_config, example_settings, prepare, train
from tests.gate_files import read_gate


def with_gate(config: FineTuneConfig, run: RunDirectory, **bounds: Any) -> FineTuneConfig:
    """The configuration with these bounds, and the run begun again under it."""
    changed = config.model_copy(update={"gate": GateSection.model_validate(bounds)})
    steps.write_run_config(changed, run, resume=True)
    return changed


def test_drift_is_recorded_of_each_example_and_confirmed_without_a_model(
    config: FineTuneConfig, run: RunDirectory
) -> None:
    verdict = steps.judge(config, run)
    losses = read_example_losses(run.gate_losses)
    assert losses.drift is not None
    assert losses.base_drift is None
    assert verdict.drift == summarise_drift(losses)
    assert verdict.drift is not None
    expected = np.average(losses.drift, weights=losses.tokens)
    assert verdict.drift.kl_initial == pytest.approx(expected)
    assert (verdict.drift.kl_initial or 0.0) > 0.01
    assert read_verdict(run.gate).drift == verdict.drift
    confirm_recorded_verdict(config, run)


def test_predictions_that_move_beyond_their_bound_are_refused(
    config: FineTuneConfig, run: RunDirectory
) -> None:
    config = with_gate(config, run, max_kl=0.01)
    moved = r"drift \(the predictions moved by .* nats a token"
    with pytest.raises(GateRejected, match=moved) as rejected:
        steps.judge(config, run)
    assert rejected.value.run == run
    assert rejected.value.verdict.summary() == read_verdict(run.gate).summary()
    assert [reason.code for reason in rejected.value.reasons] == ["drift"]
    (reason,) = read_gate(run.gate)["reasons"]
    assert "on valid.jsonl, 10 examples, 110 tokens; gate.max_kl is 0.01" in reason["message"]
    assert reason["message"].endswith("docs/gate.md#drift")


@pytest.mark.slow("judges runs of its own")
def test_drift_from_the_base_is_that_from_a_fresh_initial_adapter_and_else_a_pass_more(
    config: FineTuneConfig, run: RunDirectory, tmp_path: Path
) -> None:
    fresh = judge_run(with_gate(config, run, drift=True), run).drift
    assert fresh is not None
    assert fresh.kl_base == fresh.kl_initial
    file = str(run.adapter / "adapters.safetensors")
    settings = config.model_dump() | {"resume_adapter_file": file, "iters": 4}
    later = FineTuneConfig.model_validate(settings)
    later = later.model_copy(update={"gate": GateSection(drift=True)})
    done = train(later, prepare(later, tmp_path / "later")).run
    moved = steps.judge(later, done).drift
    assert moved is not None
    assert moved.kl_base is not None
    assert moved.kl_initial is not None
    assert moved.kl_base > moved.kl_initial > 0
    confirm_recorded_verdict(later, done)


def test_a_verdict_without_the_newer_figures_is_still_confirmed(
    config: FineTuneConfig, run: RunDirectory
) -> None:
    steps.judge(config, run)
    rows = [json.loads(line) for line in run.gate_losses.read_text().splitlines()]
    for row in rows:
        del row["drift"]
    run.gate_losses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gate = read_gate(run.gate)
    del gate["drift"]
    gate["validation"]["losses_sha256"] = read_example_losses(run.gate_losses).sha256()
    run.gate.write_text(json.dumps(gate))
    bind_again(run)
    confirm_recorded_verdict(config, run)


def make_exam(path: Path) -> Path:
    lines = (DATA / "valid.jsonl").read_text().splitlines()[:6]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_held_out_examples_may_be_a_file_of_their_own(
    config: FineTuneConfig, run: RunDirectory, tmp_path: Path
) -> None:
    exam = make_exam(tmp_path / "exam.jsonl")
    config = with_gate(config, run, held_out=str(exam))
    verdict = steps.judge(config, run)
    assert verdict.validation is not None
    assert (verdict.validation.file, verdict.validation.examples) == (str(exam), 6)
    assert verdict.validation.selected_on_same_data
    assert f"({exam}, 6 examples, step 8 of 8)" in verdict.summary()
    confirm_recorded_verdict(config, run)
    section = RegistrySection(path=str(tmp_path / "registry"), name="capitals")
    registered = config.model_copy(update={"registry": section})
    recorded = make_provenance(registered, run, read_passed_run(run.path), None)
    assert recorded["validation_digest"] is None
    edited = with_gate(config, run)
    with pytest.raises(DamagedError, match=r"config\.yaml"):
        confirm_recorded_verdict(edited, run)
    bind_again(run)
    with pytest.raises(DamagedError, match=r"thresholds differ"):
        confirm_recorded_verdict(edited, run)


def test_few_examples_and_answers_that_are_all_the_same_are_said(
    config: FineTuneConfig, run: RunDirectory, tmp_path: Path
) -> None:
    rows = [
        json.loads(line)["messages"] for line in (DATA / "valid.jsonl").read_text().splitlines()
    ]
    exam = tmp_path / "exam.jsonl"
    answer = rows[0][-1]
    same = [json.dumps({"messages": [*messages[:-1], answer]}) for messages in rows[:6]]
    exam.write_text("\n".join(same) + "\n")
    verdict = judge_run(with_gate(config, run, held_out=str(exam), max_val_loss_increase=9.0), run)
    assert verdict.validation is not None
    assert verdict.validation.has_one_answer
    visible = verdict.validation.smallest_visible
    said = f"; 6 held-out examples see differences of about {visible:.2g} nats a token"
    assert f"{said}, smaller ones hardly; all held-out answers are the same" in verdict.summary()


def test_what_is_chosen_and_not_there_is_said_before_training(tmp_path: Path) -> None:
    def begin(name: str, **bounds: Any) -> None:
        prepare(example_config(gate=bounds), tmp_path / name)

    with pytest.raises(ConfigError, match=r"gate\.held_out: .* has no test\.jsonl"):
        begin("split", held_out="test")
    with pytest.raises(ConfigError, match=r"gate\.held_out: missing\.jsonl is not a file"):
        begin("file", held_out="missing.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text("[]\n")
    with pytest.raises(DatasetError, match=r"gate\.held_out: .*bad\.jsonl holds no sound text"):
        begin("bad", held_out=str(bad))
    begin("valid", held_out="valid")


def test_a_bound_of_drift_needs_held_out_data(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_bytes((DATA / "train.jsonl").read_bytes())
    config = example_config(data=str(data), gate={"max_kl": 1.0})
    with pytest.raises(ConfigError, match=r"gate\.max_kl: .* neither test\.jsonl nor valid\.jsonl"):
        prepare(config, tmp_path / "run")


def test_a_bound_below_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gate\.max_kl"):
        parse_config(example_settings(gate={"max_kl": -1.0}), source="test.yaml")
