"""A whole run before the gate: its tiers' clocks, its losses, and what was tampered with."""

from __future__ import annotations

from typing import Any

import pytest

from nested_core.gate.checks.file_checks import CHECKS_OF_FILES
from nested_core.gate.checks.judged import begin_judging, run_checks
from nested_core.gate.evidence.run_evidence import collect_evidence
from nested_core.measure.losses.held_out_loss import read_held_out_examples, read_nonempty_splits
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_table import list_checks
from tests.builders.candidates import STEPS, Candidate, turned_around
from tests.core.gate.pairs import codes
from tests.example import example_config

REFERENCE = {
    "training": {"reference": "mlx_lm", "max_grad_norm": 0},
    "nested": {"frequencies": [1]},
}


def judge_files(candidate: Candidate) -> Verdict:
    """The verdict of the checks that need no model: those of tensors and of the tiers' updates."""
    evidence = collect_evidence(candidate.run)
    judged = begin_judging(candidate.config, candidate.run, evidence)
    run_checks(judged, CHECKS_OF_FILES)
    return judged.verdict


def test_an_honest_run_passes_with_every_number_in_place(candidate: Candidate) -> None:
    verdict = candidate.judge()
    assert verdict.has_passed
    assert verdict.adapter_step == STEPS
    rows = [(t.tier, t.frequency, t.tensors, t.changed, t.skipped_updates) for t in verdict.tiers]
    assert rows == [(0, 1, 14, 14, 0), (1, 2, 14, 14, 0), (2, 4, 14, 14, 0)]
    assert [t.expected_updates for t in verdict.tiers] == [8, 4, 2]
    assert [t.applied_updates for t in verdict.tiers] == [8, 4, 2]
    assert verdict.validation is not None
    assert verdict.validation.loss_before > verdict.validation.loss_after  # type: ignore[operator]
    assert verdict.validation.selected_on_same_data is True
    assert candidate.gate["verdict"] == "passed"


def test_gate_json_has_the_keys_of_design(judged: Candidate) -> None:
    document = judged.gate
    assert set(document) >= {"verdict", "reasons", "adapter_step", "initial", "trained", "tensors"}
    assert set(document) >= {"tiers", "validation"}
    assert set(document["initial"]) == set(document["trained"]) == {"path", "digest"}
    tensor = {"name", "tier", "changed", "max_abs_delta", "relative_delta", "finite"}
    assert all(set(row) == tensor for row in document["tensors"])
    tier = {"tier", "frequency", "tensors", "changed", "expected_updates", "applied_updates"}
    assert all(set(row) == tier | {"skipped_updates"} for row in document["tiers"])
    losses = {"loss_before", "loss_after", "selected_on_same_data", "file", "examples"}
    losses |= {"file_sha256"}
    paired = {"difference", "standard_error", "interval", "smallest_visible", "losses_sha256"}
    paired |= {"has_one_answer", "conclusion", "margin", "one_sided_high", "examples_needed"}
    paired |= {"chosen_among", "corrected_interval", "left_out", "clusters", "few_prompts"}
    paired |= {"harmed", "helped", "unit"}
    assert set(document["validation"]) == losses | paired


@pytest.mark.slow("judges twice")
def test_judging_twice_gives_the_same_file(candidate: Candidate) -> None:
    candidate.judge()
    first = candidate.run.gate.read_bytes()
    candidate.judge()
    assert candidate.run.gate.read_bytes() == first


@pytest.mark.parametrize("leaf", ["lora_a", "lora_b"])
def test_one_tensor_of_a_tier_left_as_it_was_is_named(candidate: Candidate, leaf: str) -> None:
    name = candidate.names(1, leaf)[0]
    candidate.offer({name: candidate.initial[name]}, keeps_logits=True)
    verdict = judge_files(candidate)
    (reason,) = [r for r in verdict.reasons if r.code == "updates_missing"]
    assert reason.tensors == (name,)
    assert "1 tensor had gradients and stayed as they were; the updates were" in reason.message
    checks = {check.name: check for check in list_checks(verdict)}
    assert checks["updates"].verdict == "passed"  # all were applied: another row says what failed
    moved = checks["tensors that updates moved"]
    assert (moved.after, moved.verdict) == ("41 of 42 moved", "updates_missing")
    slow = judge_files(candidate.configured(learning_rate=1e-12))
    (reason,) = [r for r in slow.reasons if r.code == "updates_missing"]
    assert "a learning rate of 1e-12 is too small to move a float32 weight: raise" in reason.message
    assert ("no_effect" in codes(verdict)) is (leaf == "lora_b")


def test_skipped_updates_are_bounded_by_their_share(candidate: Candidate) -> None:
    def skip_one_of_eight(state: dict[str, Any]) -> None:
        state["tiers"][0] |= {"updates": 7, "skipped": 1}

    candidate.rewrite(change_state=skip_one_of_eight)
    verdict = judge_files(candidate.bounded(max_skipped_share=0.124))
    assert codes(verdict) == ["updates_missing"]
    (updates,) = [check for check in list_checks(verdict) if check.name == "updates"]
    assert updates.verdict == "updates_missing"


@pytest.mark.slow("judges a run of its own")
def test_a_loss_that_rose_is_rejected_with_both_numbers(candidate: Candidate) -> None:
    candidate.rewrite(change_adapter=turned_around)
    candidate.require_rejected("loss_regressed")
    document = candidate.gate
    (reason,) = document["reasons"]
    losses = document["validation"]
    assert losses["loss_after"] > losses["loss_before"] > 4
    assert f"loss {losses['loss_before']:.4g} -> {losses['loss_after']:.4g}" in reason["message"]


@pytest.mark.slow("judges a run three times")
def test_a_loss_may_rise_by_the_share_that_is_configured(candidate: Candidate) -> None:
    candidate.rewrite(change_adapter=turned_around)
    verdict = candidate.bounded(max_val_loss_increase=1e9).verdict()
    assert verdict.has_passed
    losses = verdict.validation
    assert losses is not None
    possible = losses.one_sided_high / losses.loss_before  # type: ignore[operator]
    for bound, passes in ((possible * 0.99, False), (possible * 1.01, True)):
        assert candidate.bounded(max_val_loss_increase=bound).verdict().has_passed is passes


@pytest.mark.parametrize(
    ("changes", "is_selected"),
    [({}, True), ({"val_batches": 0}, False), (REFERENCE, False)],
    ids=["best step", "no evaluation", "last step"],
)
def test_examples_chose_the_step_only_where_the_best_one_is_offered(
    changes: dict[str, Any], is_selected: bool, candidate: Candidate
) -> None:
    splits = read_nonempty_splits(candidate.config, candidate.run)
    held_out = read_held_out_examples(example_config(**changes), splits)
    assert held_out is not None
    assert held_out.selected_on_same_data is is_selected
