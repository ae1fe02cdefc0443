"""Held-out losses example by example: what is kept, and a rise that is chance is no regression."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.config.sections import GateSection
from nested_core.errors import DamagedError
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.measure.losses.loss_figures import loss_reasons, summarise_losses
from nested_core.records.losses import read_example_losses
from nested_core.records.paired_difference import compare_pairs
from nested_core.records.verdict_file import parse_verdict
from nested_core.storage.manifest import describe_file
from tests.builders.candidates import Candidate
from tests.builders.data_sets import write_lines
from tests.builders.losses import losses_of, validation_of

DEFAULT = GateSection()


def test_a_rise_within_noise_is_refused_by_the_bound_alone_only() -> None:
    differences = [0.5, -0.4, 0.3, -0.3, 0.15, -0.1] * 2
    validation = validation_of(losses_of(differences, before=2.0))
    assert validation.loss_after > validation.loss_before  # type: ignore[operator]
    assert validation.conclusion == "inconclusive"
    assert loss_reasons(validation, DEFAULT) == []
    bounds: dict[str, Any] = {"noise": "none", "max_val_loss_increase": 0.0}
    risen = validation_of(losses_of(differences, before=2.0), **bounds)
    (reason,) = loss_reasons(risen, GateSection(**bounds))
    assert reason.code == "loss_regressed"


@pytest.mark.claim("A significantly worse adapter (loss, answers) passes only within set limits")
def test_a_rise_beyond_bound_and_noise_is_refused_with_its_figures_and_its_data() -> None:
    validation = validation_of(losses_of([0.2, 0.25, 0.3, 0.35] * 3, before=2.0))
    (reason,) = loss_reasons(validation, GateSection())
    assert reason.message.startswith("loss 2 -> 2.275 on valid.jsonl, 12 examples, +0.275 with a")
    assert "95 % interval of +0.2" in reason.message
    risen = losses_of([0.2, 0.25, 0.3, 0.35] * 3, before=2.0)
    wide = validation_of(risen, max_val_loss_increase=0.2)
    assert loss_reasons(wide, GateSection(max_val_loss_increase=0.2)) == []


def test_with_too_few_examples_for_an_interval_a_rise_by_more_than_a_tenth_counts() -> None:
    validation = validation_of(losses_of([0.2, -0.1], before=2.0))
    assert (validation.interval, validation.smallest_visible) == (None, None)
    assert validation.conclusion == "inconclusive"
    assert loss_reasons(validation, DEFAULT) == []
    (reason,) = loss_reasons(validation_of(losses_of([0.3, 0.12], before=2.0)), DEFAULT)
    assert (
        "2 examples, +0.21; fewer than 5 independent examples are too few to tell" in reason.message
    )
    risen = validation_of(losses_of([0.2, -0.1], before=2.0), max_val_loss_increase=0.0)
    (reason,) = loss_reasons(risen, GateSection(max_val_loss_increase=0.0))
    assert reason.code == "loss_regressed"


def test_the_losses_of_each_example_are_kept_and_give_the_figures(candidate: Candidate) -> None:
    verdict = candidate.judge()
    losses = read_example_losses(candidate.run.gate_losses)
    validation = candidate.gate["validation"]
    held_out = candidate.held_out()
    assert losses.lines.tolist() == held_out.split.lines.tolist()
    assert (losses.file, losses.champion) == ("valid.jsonl", None)
    assert validation["examples"] == len(losses) == len(held_out.split)
    paired = compare_pairs(losses.before, losses.after, losses.tokens)
    assert validation["interval"] == [paired.low, paired.high]
    assert validation["difference"] == paired.mean
    before, after = validation["loss_before"], validation["loss_after"]
    assert after - before == pytest.approx(paired.mean)
    assert validation["losses_sha256"] == describe_file(candidate.run.gate_losses)["sha256"]
    assert f"(valid.jsonl, {len(losses)} examples, step 8 of 8)" in verdict.summary()


def test_an_examples_loss_is_the_one_that_it_has_alone(candidate: Candidate) -> None:
    held_out, adapters = candidate.held_out().split, [candidate.run.adapter]
    alone = candidate.configured(batch_size=1).config
    (together,) = LoadedBase.load(candidate.config).example_loss_sums(adapters, held_out)
    (single,) = LoadedBase.load(alone).example_loss_sums(adapters, held_out)
    np.testing.assert_allclose(together[0], single[0], rtol=1e-4)
    np.testing.assert_array_equal(together[1], single[1])


@pytest.mark.parametrize("number", [10**400, -(10**400), math.inf, math.nan])
def test_a_verdict_with_a_number_that_no_float_holds_is_damaged(judged, number) -> None:
    gate = judged.gate
    gate["thresholds"]["max_kl"] = number
    with pytest.raises(DamagedError, match="holds no verdict: .* is "):
        parse_verdict(gate, judged.run.gate)


Rows = list[dict[str, Any]]


def change_one_loss(rows: Rows) -> Rows:
    return [rows[0] | {"after": rows[0]["after"] - 0.5}, *rows[1:]]


def drop_one_example(rows: Rows) -> Rows:
    return rows[1:]


def write_no_losses(rows: Rows) -> Rows:
    return [{"file": "valid.jsonl"}]


@pytest.mark.parametrize("change", [change_one_loss, drop_one_example, write_no_losses])
def test_losses_that_were_edited_are_damage(judged, change) -> None:
    path = judged.run.gate_losses
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, change(rows))
    judged.require_damaged(r"was not given on the gate-losses\.jsonl")


def test_losses_that_are_not_finite_are_null_and_give_no_difference(tmp_path: Path) -> None:
    losses = losses_of([0.1, np.nan, 0.2], before=2.0)
    path = tmp_path / "gate-losses.jsonl"
    path.write_bytes(losses.render())
    assert json.loads(path.read_text().splitlines()[1])["after"] is None
    read = read_example_losses(path)
    np.testing.assert_array_equal(read.after, losses.after)
    validation = summarise_losses(read, GateSection(), selected_on_same_data=False)
    assert (validation.loss_after, validation.difference) == (None, None)
