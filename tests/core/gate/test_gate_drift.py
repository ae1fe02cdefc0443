"""How far predictions move is measured on the held-out examples, recorded and bounded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection, RegistrySection
from nested_core.errors import ConfigError, DatasetError, GateRejected
from nested_core.measure.losses.loss_figures import drift_reasons, summarise_drift
from nested_core.models.session import Session
from nested_core.pipeline import steps
from nested_core.pipeline.publishing import make_provenance
from nested_core.records.judged_run import read_judged_run
from nested_core.records.losses import read_example_losses
from nested_core.records.verdict_file import read_verdict
from nested_core.storage.untrusted_files import regular_sha256
from tests.builders.candidates import Candidate, example_data, train_candidate
from tests.builders.data_sets import write_lines
from tests.builders.losses import losses_of
from tests.example import DATA, example_config, prepare


def test_drift_is_recorded_of_each_example_and_confirmed_without_a_model(candidate) -> None:
    verdict = candidate.judge()
    losses = read_example_losses(candidate.run.gate_losses)
    assert losses.drift is not None
    assert losses.base_drift is None
    assert verdict.drift == summarise_drift(losses)
    assert verdict.drift is not None
    expected = np.average(losses.drift, weights=losses.tokens)
    assert verdict.drift.kl_initial == pytest.approx(expected)
    assert (verdict.drift.kl_initial or 0.0) > 0.01
    assert read_verdict(candidate.run.gate).drift == verdict.drift
    candidate.confirm()


def test_predictions_that_move_beyond_their_bound_are_refused(candidate: Candidate) -> None:
    candidate = candidate.resumed(max_kl=0.01)
    moved = r"drift: the mean KL divergence from the initial adapter is .* nats/token"
    with pytest.raises(GateRejected, match=moved) as rejected:
        candidate.judge()
    assert rejected.value.run == candidate.run
    assert rejected.value.verdict.summary() == read_verdict(candidate.run.gate).summary()
    assert [reason.code for reason in rejected.value.reasons] == ["drift"]
    gate = candidate.gate
    (reason,) = gate["reasons"]
    assert "on valid.jsonl, 10 examples, 110 tokens; gate.max_kl is 0.01" in reason["message"]
    assert reason["message"].endswith("docs/gate.md#drift")


@pytest.mark.parametrize(("unit", "said"), [("nats/token", ", 30 tokens;"), ("nats/example", "s;")])
def test_tokens_are_said_where_the_mean_is_over_tokens(unit: str, said: str) -> None:
    losses = losses_of([0.1, 0.1, 0.1], drift=np.full(3, 5.0), unit=unit)
    drift = summarise_drift(losses)
    (reason,) = drift_reasons(drift, "valid.jsonl, 3 examples", GateSection(max_kl=4.0))
    assert f"valid.jsonl, 3 example{said} gate.max_kl is 4" in reason.message.replace("s, ", ", ")
    assert drift is not None
    assert ("30 tokens" in drift.describe()) is (unit == "nats/token")


@pytest.mark.slow("judges runs of its own")
def test_drift_from_the_base_is_that_from_a_fresh_initial_adapter_and_else_a_pass_more(
    candidate: Candidate, tmp_path: Path
) -> None:
    fresh = candidate.resumed(drift=True).verdict().drift
    assert fresh is not None
    assert fresh.kl_base == fresh.kl_initial
    file = str(candidate.run.adapter / "adapters.safetensors")
    settings = candidate.config.model_dump() | {"resume_adapter_file": file, "iters": 4}
    config = FineTuneConfig.model_validate(settings | {"gate": {"drift": True}})
    later = train_candidate(tmp_path / "later", config)
    moved = later.judge().drift
    assert moved is not None
    assert moved.kl_base is not None
    assert moved.kl_initial is not None
    assert moved.kl_base > moved.kl_initial > 0
    later.confirm()


def test_a_verdict_without_the_newer_figures_is_still_confirmed(judged: Candidate) -> None:
    rows = [json.loads(line) for line in judged.run.gate_losses.read_text().splitlines()]
    for row in rows:
        del row["drift"]
    write_lines(judged.run.gate_losses, rows)
    gate = judged.gate
    del gate["drift"]
    gate["validation"]["losses_sha256"] = read_example_losses(judged.run.gate_losses).sha256()
    judged.edit_gate(gate)
    judged.bind_again()
    judged.confirm()


@pytest.mark.slow("judges a run of its own")
def test_the_held_out_examples_may_be_a_file_of_their_own(candidate, tmp_path) -> None:
    lines = (DATA / "valid.jsonl").read_text().splitlines(keepends=True)
    exam = tmp_path / "exam.jsonl"
    exam.write_text("".join(lines[:6]))
    candidate = candidate.resumed(held_out=str(exam))
    verdict = candidate.judge()
    assert verdict.validation is not None
    assert (verdict.validation.file, verdict.validation.examples) == (str(exam), 6)
    assert verdict.validation.selected_on_same_data
    assert "(exam.jsonl, 6 examples, step 8 of 8)" in verdict.summary()
    candidate.confirm()
    section = RegistrySection(path=str(tmp_path / "registry"), name="capitals")
    registered = candidate.configured(registry=section).config
    recorded = make_provenance(registered, read_judged_run(candidate.run.path), None)
    assert recorded["validation_digest"] == regular_sha256(exam)
    edited = candidate.resumed()
    edited.require_damaged(r"config\.yaml")
    edited.bind_again()
    edited.require_damaged(r"thresholds differ")


@pytest.mark.slow("judges a run of its own")
def test_what_the_gate_had_in_hand_is_what_its_folder_says(candidate) -> None:
    session = Session()
    steps.judge(candidate.config, candidate.run, session=session)
    in_hand, read = session.judged, read_judged_run(candidate.run.path)
    assert in_hand is not None
    assert (in_hand.bound, in_hand.dataset) == (read.bound, read.dataset)
    assert in_hand.adapter.files == read.adapter.files
    made = [make_provenance(candidate.config, judged, None) for judged in (in_hand, read)]
    assert made[0] == made[1]


@pytest.mark.slow("judges a run of its own")
def test_few_examples_and_answers_that_are_all_the_same_are_said(candidate, tmp_path) -> None:
    lines = (DATA / "valid.jsonl").read_text().splitlines()[:6]
    chats = [json.loads(line)["messages"] for line in lines]
    answer = chats[0][-1]
    same = [{"messages": [*messages[:-1], answer]} for messages in chats]
    exam = write_lines(tmp_path / "exam.jsonl", same)
    bounds = {"held_out": str(exam), "max_val_loss_increase": 9.0}
    verdict = candidate.bounded(**bounds).verdict()
    assert verdict.validation is not None
    assert verdict.validation.has_one_answer
    visible = verdict.validation.smallest_visible
    said = f"; 6 held-out examples reliably detect changes of {1.43 * visible:.2g} nats/token"
    assert f"{said} or more (80 % power); all held-out answers are the same" in verdict.summary()


def test_what_is_chosen_and_not_there_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("[]\n")
    for held_out, error, said in (
        ("test", ConfigError, r"gate\.held_out: .* has no test\.jsonl"),
        ("missing.jsonl", ConfigError, r"gate\.held_out: missing\.jsonl is not a file"),
        (f"{tmp_path}/bad.jsonl", DatasetError, r"gate\.held_out: .*bad\.jsonl holds no sound tex"),
    ):
        config = example_config(gate={"held_out": held_out})
        with pytest.raises(error, match=said):
            prepare(config, tmp_path / said[-9:])
    prepare(example_config(gate={"held_out": "valid"}), tmp_path / "valid")


def test_a_bound_of_drift_needs_held_out_data(tmp_path: Path) -> None:
    data = example_data(tmp_path / "data", "train")
    config = example_config(data=str(data), gate={"max_kl": 1.0})
    with pytest.raises(ConfigError, match=r"gate\.max_kl: .* neither test\.jsonl nor valid\.jsonl"):
        prepare(config, tmp_path / "run")
