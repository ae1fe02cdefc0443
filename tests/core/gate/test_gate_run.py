"""A whole run before the gate: its tiers' clocks, its losses, and what was tampered with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.errors import GateRejected
from nested_core.gate import Verdict, judge_run
from nested_core.gate.file_checks import CHECKS_OF_FILES
from nested_core.gate.held_out_loss import read_held_out_examples, read_nonempty_splits
from nested_core.gate.judged import begin_judging_run, make_checks
from nested_core.gate.run_evidence import collect_evidence
from nested_core.pipeline import steps
from nested_core.records.verdict_document import list_checks
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from tests.core.gate.conftest import STEPS, Rewrite
from tests.core.gate.pairs import codes
from tests.example import example_config

ANY_LOSS = GateSection(max_val_loss_increase=1e9)


def tier_names(run: RunDirectory, tier: int) -> list[str]:
    owners = json.loads(run.tiers.read_bytes())["tensors"]
    return [name for name, owner in owners.items() if owner == tier]


def judge(config: FineTuneConfig, run: RunDirectory) -> Verdict:
    """The verdict whatever the loss."""
    return judge_run(config.model_copy(update={"gate": ANY_LOSS}), run)


def judge_files(config: FineTuneConfig, run: RunDirectory) -> Verdict:
    """The verdict of the checks that need no model: those of tensors and of the tiers' updates."""
    judged = begin_judging_run(config, run, collect_evidence(run))
    make_checks(judged, CHECKS_OF_FILES)
    return judged.verdict


def test_an_honest_run_passes_with_every_number_in_place(
    config: FineTuneConfig, run: RunDirectory
) -> None:
    verdict = steps.judge(config, run)
    assert verdict.has_passed
    assert verdict.adapter_step == STEPS
    rows = [(t.tier, t.frequency, t.tensors, t.changed, t.skipped_updates) for t in verdict.tiers]
    assert rows == [(0, 1, 28, 28, 0), (1, 2, 28, 28, 0), (2, 4, 28, 28, 0)]
    assert [t.expected_updates for t in verdict.tiers] == [8, 4, 2]
    assert [t.applied_updates for t in verdict.tiers] == [8, 4, 2]
    assert verdict.validation is not None
    assert verdict.validation.loss_before > verdict.validation.loss_after  # type: ignore[operator]
    assert verdict.validation.selected_on_same_data is True
    assert json.loads(run.gate.read_bytes())["verdict"] == "passed"


def test_gate_json_has_the_keys_of_design(config: FineTuneConfig, run: RunDirectory) -> None:
    steps.judge(config, run)
    document = json.loads(run.gate.read_bytes())
    assert set(document) >= {"verdict", "reasons", "adapter_step", "initial", "trained", "tensors"}
    assert set(document) >= {"tiers", "validation"}
    assert set(document["initial"]) == set(document["trained"]) == {"path", "digest"}
    tensor = {"name", "tier", "changed", "max_abs_delta", "relative_delta", "finite"}
    assert all(set(row) == tensor for row in document["tensors"])
    tier = {"tier", "frequency", "tensors", "changed", "expected_updates", "applied_updates"}
    assert all(set(row) == tier | {"skipped_updates"} for row in document["tiers"])
    losses = {"loss_before", "loss_after", "selected_on_same_data", "file", "examples"}
    paired = {"difference", "standard_error", "interval", "smallest_visible", "losses_sha256"}
    paired |= {"has_one_answer", "conclusion", "margin", "one_sided_high", "examples_needed"}
    paired |= {"chosen_among", "corrected_interval", "left_out", "clusters", "few_prompts"}
    paired |= {"harmed", "helped"}
    assert set(document["validation"]) == losses | paired


def test_judging_twice_gives_the_same_file(config: FineTuneConfig, run: RunDirectory) -> None:
    steps.judge(config, run)
    first = run.gate.read_bytes()
    steps.judge(config, run)
    assert run.gate.read_bytes() == first


def test_a_tier_left_as_it_was_is_named(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite
) -> None:
    initial = load_arrays(run.initial / "adapters.safetensors")
    names = tier_names(run, 2)
    rewrite(
        change_adapter=lambda t: t.update({name: initial[name] for name in names}),
        keeps_logits=True,
    )
    verdict = judge_files(config, run)
    assert set(codes(verdict)) == {"no_effect", "tier_unchanged"}
    (reason,) = [r for r in verdict.reasons if r.code == "tier_unchanged"]
    assert set(reason.tensors) == set(names)
    assert "tier 2 (every 4): nothing was trained" in reason.message
    assert [tier.changed for tier in verdict.tiers] == [28, 28, 0]


@pytest.mark.parametrize("leaf", ["lora_a", "lora_b"])
def test_one_tensor_of_a_tier_left_as_it_was_is_named(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite, leaf: str
) -> None:
    initial = load_arrays(run.initial / "adapters.safetensors")
    name = next(name for name in tier_names(run, 1) if name.endswith(leaf))
    rewrite(change_adapter=lambda t: t.update({name: initial[name]}), keeps_logits=True)
    verdict = judge_files(config, run)
    (reason,) = [r for r in verdict.reasons if r.code == "updates_missing"]
    assert reason.tensors == (name,)
    assert "1 tensor had gradients and stayed as they were; the updates were" in reason.message
    checks = {check.name: check for check in list_checks(verdict)}
    assert checks["updates"].verdict == "passed"  # all were applied: another row says what failed
    moved = checks["tensors that updates moved"]
    assert (moved.after, moved.verdict) == ("83 of 84 moved", "updates_missing")
    slow = judge_files(config.model_copy(update={"learning_rate": 1e-12}), run)
    (reason,) = [r for r in slow.reasons if r.code == "updates_missing"]
    assert "a learning rate of 1e-12 is too small to move a float32 weight: raise" in reason.message
    assert ("no_effect" in codes(verdict)) is (leaf == "lora_b")


def test_an_adapter_that_is_the_initial_one_is_unchanged(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite
) -> None:
    initial = load_arrays(run.initial / "adapters.safetensors")
    rewrite(change_adapter=lambda t: t.update(initial))
    assert codes(judge_run(config, run))[0] == "unchanged"


def counted(tier: int, key: str, value: int) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state["tiers"][tier][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (counted(0, "updates", 7), "8 updates were due by step 8, 7 were applied and 0 skipped"),
        (counted(1, "updates", 5), "4 updates were due by step 8, 5 were applied and 0 skipped"),
        (counted(2, "updates", 0), "2 updates were due by step 8, 0 were applied and 0 skipped"),
        (counted(0, "skipped", 1), "8 updates were due by step 8, 8 were applied and 1 skipped"),
    ],
)
def test_a_tier_table_that_does_not_add_up_is_rejected(
    config: FineTuneConfig,
    run: RunDirectory,
    rewrite: Rewrite,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    rewrite(change_state=change)
    verdict = judge_files(config, run)
    assert "updates_missing" in codes(verdict)
    (updates,) = [check for check in list_checks(verdict) if check.name == "updates"]
    assert updates.verdict == "updates_missing"
    assert any(message in reason.message for reason in verdict.reasons)


def test_a_flush_that_never_was_does_not_add_up(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite
) -> None:
    rewrite(change_state=counted(2, "updates", 3))
    verdict = judge_files(config, run)
    assert codes(verdict) == ["updates_missing"]


@pytest.mark.parametrize(("share", "passes"), [(0.01, False), (0.124, False), (0.125, True)])
def test_skipped_updates_are_bounded_by_their_share(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite, share: float, passes: bool
) -> None:
    def skip_one_of_eight(state: dict[str, Any]) -> None:
        state["tiers"][0] |= {"updates": 7, "skipped": 1}

    rewrite(change_state=skip_one_of_eight)
    bounds = GateSection(max_skipped_share=share)
    verdict = judge_files(config.model_copy(update={"gate": bounds}), run)
    assert verdict.has_passed is passes
    assert codes(verdict) == ([] if passes else ["updates_missing"])


def test_a_tier_whose_moments_are_all_zero_was_not_trained(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite
) -> None:
    def forget(moments: dict[str, mx.array]) -> None:
        for name in tier_names(run, 1):
            moments[f"{name}.v"] = mx.zeros_like(moments[f"{name}.v"])

    rewrite(change_moments=forget)
    assert codes(judge_files(config, run)) == ["tier_unchanged"]


def worse(tensors: dict[str, mx.array]) -> None:
    for name in tensors:
        tensors[name] = tensors[name] + 0.5


def test_a_loss_that_rose_is_rejected_with_both_numbers(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite
) -> None:
    rewrite(change_adapter=worse)
    with pytest.raises(GateRejected, match="loss_regressed"):
        steps.judge(config, run)
    document = json.loads(run.gate.read_bytes())
    (reason,) = document["reasons"]
    losses = document["validation"]
    assert losses["loss_after"] > losses["loss_before"] > 4
    assert f"loss {losses['loss_before']:.4g} -> {losses['loss_after']:.4g}" in reason["message"]


@pytest.mark.slow("judges a run three times")
def test_a_loss_may_rise_by_the_share_that_is_configured(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite
) -> None:
    rewrite(change_adapter=worse)
    verdict = judge(config, run)
    assert verdict.has_passed
    losses = verdict.validation
    assert losses is not None
    possible = losses.one_sided_high / losses.loss_before  # type: ignore[operator]
    for bound, passes in ((possible * 0.99, False), (possible * 1.01, True)):
        section = GateSection(max_val_loss_increase=bound)
        changed = config.model_copy(update={"gate": section})
        assert judge_run(changed, run).has_passed is passes


def test_finite_weights_whose_loss_is_not_finite_are_rejected(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite
) -> None:
    rewrite(change_adapter=lambda t: t.update({name: v + 1e17 for name, v in t.items()}))
    verdict = judge(config, run)
    assert codes(verdict) == ["non_finite"]
    assert "-> not finite with the trained adapter" in verdict.reasons[0].message
    assert verdict.validation is not None
    assert verdict.validation.loss_after is None


def test_a_weight_that_is_not_a_number_is_rejected_before_any_loss(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite
) -> None:
    name = tier_names(run, 0)[0]
    rewrite(change_adapter=lambda t: t.update({name: t[name] * float("nan")}))
    with pytest.raises(GateRejected, match="non_finite"):
        steps.judge(config, run)
    assert json.loads(run.gate.read_bytes())["validation"] is None


@pytest.mark.parametrize(
    ("changes", "is_selected"),
    [
        ({}, True),
        ({"val_batches": 0}, False),
        (
            {
                "training": {"reference": "mlx_lm", "max_grad_norm": 0},
                "nested": {"frequencies": [1]},
            },
            False,
        ),
    ],
    ids=["best step", "no evaluation", "last step"],
)
def test_examples_chose_the_step_only_where_the_best_one_is_offered(
    changes: dict[str, Any], is_selected: bool, run: RunDirectory, config: FineTuneConfig
) -> None:
    splits = read_nonempty_splits(config, run)
    held_out = read_held_out_examples(example_config(**changes), splits)
    assert held_out is not None
    assert held_out.selected_on_same_data is is_selected
