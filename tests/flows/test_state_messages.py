"""What states say: the figures of a verdict, and a button in place of a command."""

from __future__ import annotations

import json
from pathlib import Path

from flows.flow_runs.state_messages import describe_loss, describe_rejection, describe_test_loss
from nested_core.storage.run_directory import RunDirectory
from tests.core.report.verdicts import make_verdict
from tests.example import example_config

LOSSES = {
    "loss_before": 0.01841697,
    "loss_after": 0.02131234,
    "selected_on_same_data": False,
    "examples": 84,
    "file": "valid.jsonl",
}
TENSOR = {"changed": False, "max_abs_delta": 0.0, "relative_delta": 0.0, "finite": True}
CHAMPION = {"version": "670791" + "0" * 58, "loss": 0.01841697}


def test_a_rejection_for_its_loss_has_both_losses_and_the_champions() -> None:
    reasons = [{"code": "loss_regressed", "message": "long", "tensors": []}]
    verdict = make_verdict(validation=LOSSES, champion=CHAMPION, reasons=reasons)
    assert describe_rejection(verdict) == (
        "rejected: loss_regressed 0.01842 -> 0.02131 on 84 examples; champion 670791000000 0.01842"
    )


def test_a_rejection_for_tensors_names_the_tiers_and_why() -> None:
    tensors = [TENSOR | {"name": "a", "tier": 2}, TENSOR | {"name": "b", "tier": 0}]
    reasons = [{"code": "tier_unchanged", "message": "no gradient came", "tensors": ["a"]}]
    verdict = make_verdict(tensors=tensors, reasons=reasons)
    assert describe_rejection(verdict) == "rejected: tier_unchanged tier 2: no gradient came"


def test_names_in_a_reason_are_escaped_for_state_and_event() -> None:
    reasons = [{"code": "non_finite", "message": "tensor \x1b[2Ja\u202eb", "tensors": []}]
    shown = describe_rejection(make_verdict(reasons=reasons))
    assert shown == r"rejected: non_finite: tensor \x1b[2Ja\u202eb"


def test_a_loss_is_told_with_the_champions(tmp_path: Path) -> None:
    verdict = make_verdict(validation=LOSSES, champion=CHAMPION)
    assert describe_loss(verdict) == "val loss 0.01842 -> 0.02131; champion 670791000000 0.01842"
    assert describe_loss(make_verdict()) == "no validation set"


def test_the_test_loss_names_its_file_examples_and_adapter(tmp_path: Path) -> None:
    verdict = make_verdict(adapter_step=80)
    run = RunDirectory(tmp_path)
    run.dataset.write_text(json.dumps({"splits": {"test": {"file": "test.parquet"}}}))
    limited = describe_test_loss(example_config(test_batches=5, batch_size=4), run, verdict, 1.0)
    assert limited == (
        "Test loss 1, Test ppl 2.718 (test.parquet, at most 5 batches of 4, adapter of step 80)"
    )
    everything = example_config(test_batches=-1)
    assert "(test.parquet, all examples, " in describe_test_loss(everything, run, verdict, 1.0)
    assert "Test loss 800, Test ppl not finite" in describe_test_loss(
        everything, run, verdict, 800.0
    )
