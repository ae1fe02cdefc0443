"""Held-out losses example by example: what is kept, and a rise that is chance is no regression."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.errors import DamagedError
from nested_core.gate.example_losses import ExampleLosses, read_example_losses
from nested_core.gate.held_out_loss import (
    LoadedBase,
    choose_held_out_examples,
    read_nonempty_splits,
)
from nested_core.gate.loss_figures import loss_reasons, summarise_losses
from nested_core.gate.paired_difference import compare_pairs
from nested_core.pipeline import steps
from nested_core.pipeline.publishing import confirm_recorded_verdict
from nested_core.records.verdict import Validation
from nested_core.records.verdict_file import parse_verdict
from nested_core.storage.manifest import describe_file
from nested_core.storage.run_directory import RunDirectory
from tests.gate_files import read_gate


def losses_of(differences: list[float]) -> ExampleLosses:
    """Examples of 10 tokens whose loss of 2 nats changed by these differences."""
    before = np.full(len(differences), 2.0)
    lines = np.arange(1, len(differences) + 1)
    tokens = np.full(len(differences), 10.0)
    return ExampleLosses("valid.jsonl", lines, tokens, before, before + np.array(differences))


DEFAULT = GateSection()


def validation_of(differences: list[float], bounds: GateSection = DEFAULT) -> Validation:
    return summarise_losses(losses_of(differences), selected_on_same_data=True, bounds=bounds)


def test_a_rise_within_noise_is_refused_by_the_bound_alone_only() -> None:
    differences = [0.5, -0.4, 0.3, -0.3, 0.15, -0.1] * 2
    validation = validation_of(differences)
    assert validation.loss_after > validation.loss_before  # type: ignore[operator]
    assert validation.conclusion == "inconclusive"
    assert loss_reasons(validation, DEFAULT) == []
    zero = GateSection(noise="none", max_val_loss_increase=0.0)
    (reason,) = loss_reasons(validation_of(differences, zero), zero)
    assert reason.code == "loss_regressed"


@pytest.mark.claim(
    "What was shown to be worse, in loss or answers, does not pass; "
    "too few examples to tell is said"
)
def test_a_rise_beyond_bound_and_noise_is_refused_with_its_figures_and_its_data() -> None:
    validation = validation_of([0.2, 0.25, 0.3, 0.35] * 3)
    (reason,) = loss_reasons(validation, GateSection())
    assert reason.message.startswith("loss 2 -> 2.275 on valid.jsonl, 12 examples, +0.275 with a")
    assert "95 % interval of +0.2" in reason.message
    wide = GateSection(max_val_loss_increase=0.2)
    assert loss_reasons(validation_of([0.2, 0.25, 0.3, 0.35] * 3, wide), wide) == []


def test_with_too_few_examples_for_an_interval_a_rise_by_more_than_a_tenth_counts() -> None:
    validation = validation_of([0.2, -0.1])
    assert (validation.interval, validation.smallest_visible) == (None, None)
    assert validation.conclusion == "inconclusive"
    assert loss_reasons(validation, DEFAULT) == []
    (reason,) = loss_reasons(validation_of([0.3, 0.12]), DEFAULT)
    assert "2 examples, +0.21; so few examples can show no difference" in reason.message
    zero = GateSection(max_val_loss_increase=0.0)
    (reason,) = loss_reasons(validation_of([0.2, -0.1], zero), zero)
    assert reason.code == "loss_regressed"


def test_the_losses_of_each_example_are_kept_and_give_the_figures(
    config: FineTuneConfig, run: RunDirectory
) -> None:
    verdict = steps.judge(config, run)
    losses = read_example_losses(run.gate_losses)
    validation = read_gate(run.gate)["validation"]
    held_out = choose_held_out_examples(read_nonempty_splits(config, run))
    assert held_out is not None
    assert losses.lines.tolist() == held_out.split.lines.tolist()
    assert (losses.file, losses.champion) == ("valid.jsonl", None)
    assert validation["examples"] == len(losses) == len(held_out.split)
    paired = compare_pairs(losses.before, losses.after, losses.tokens)
    assert validation["interval"] == [paired.low, paired.high]
    assert validation["difference"] == paired.mean
    before, after = validation["loss_before"], validation["loss_after"]
    assert after - before == pytest.approx(paired.mean)
    assert validation["losses_sha256"] == describe_file(run.gate_losses)["sha256"]
    assert f"(valid.jsonl, {len(losses)} examples, step 8 of 8)" in verdict.summary()


def test_an_examples_loss_is_the_one_that_it_has_alone(
    config: FineTuneConfig, run: RunDirectory
) -> None:
    held_out = choose_held_out_examples(read_nonempty_splits(config, run))
    assert held_out is not None
    alone = config.model_copy(update={"batch_size": 1})
    (together,) = LoadedBase.load(config).example_loss_sums([run.adapter], held_out.split)
    (single,) = LoadedBase.load(alone).example_loss_sums([run.adapter], held_out.split)
    np.testing.assert_allclose(together[0], single[0], rtol=1e-4)
    np.testing.assert_array_equal(together[1], single[1])


@pytest.mark.parametrize("number", [10**400, -(10**400), math.inf, math.nan])
def test_a_verdict_with_a_number_that_no_float_holds_is_damaged(
    judged: RunDirectory, number: float
) -> None:
    gate = read_gate(judged.gate)
    gate["thresholds"]["max_kl"] = number
    with pytest.raises(DamagedError, match="holds no verdict: .* is "):
        parse_verdict(gate, judged.gate)


def change_one_loss(run: RunDirectory) -> None:
    lines = run.gate_losses.read_text().splitlines()
    row = json.loads(lines[0])
    lines[0] = json.dumps(row | {"after": row["after"] - 0.5})
    run.gate_losses.write_text("\n".join(lines) + "\n")


def drop_one_example(run: RunDirectory) -> None:
    run.gate_losses.write_text("".join(run.gate_losses.read_text().splitlines(True)[1:]))


def write_no_losses(run: RunDirectory) -> None:
    run.gate_losses.write_text('{"file": "valid.jsonl"}\n')


@pytest.mark.parametrize("change", [change_one_loss, drop_one_example, write_no_losses])
def test_losses_that_were_edited_are_damage(
    config: FineTuneConfig, judged: RunDirectory, change: Callable[[RunDirectory], None]
) -> None:
    run = judged
    change(run)
    with pytest.raises(DamagedError, match=r"was not given on the gate-losses\.jsonl"):
        confirm_recorded_verdict(config, run)


def test_losses_that_are_not_finite_are_null_and_give_no_difference(tmp_path: Path) -> None:
    losses = losses_of([0.1, np.nan, 0.2])
    path = tmp_path / "gate-losses.jsonl"
    path.write_bytes(losses.render())
    assert json.loads(path.read_text().splitlines()[1])["after"] is None
    read = read_example_losses(path)
    np.testing.assert_array_equal(read.after, losses.after)
    validation = summarise_losses(read, selected_on_same_data=False)
    assert (validation.loss_after, validation.difference) == (None, None)
