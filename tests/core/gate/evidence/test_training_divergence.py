"""A run that diverged is told as such: never as another configuration, and with rate and step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nested_core.gate.checks.losses import TRAINING_LOSS
from nested_core.gate.evidence.training_divergence import Divergence, find_divergence
from nested_core.records.metrics import read_metrics
from nested_core.records.verdict import Validation
from tests.builders.candidates import Candidate, example_data, train_candidate, vouch
from tests.builders.data_sets import write_lines
from tests.core.gate.pairs import codes

NOTHING_LEFT = Validation(None, None, selected_on_same_data=False, examples=0, left_out=10)
MEASURED = Validation(4.0, 4.1, selected_on_same_data=False, examples=10, left_out=0)


@pytest.mark.slow("trains and judges a run of its own")
@pytest.mark.parametrize("frequencies", [[1], [1, 2, 4]])
def test_a_learning_rate_of_50_is_not_finite_and_named_with_the_step(tmp_path, frequencies) -> None:
    fast: dict[str, Any] = {"learning_rate": 50.0, "steps_per_report": 2, "val_batches": 1}
    done = train_candidate(tmp_path / "run", nested={"frequencies": frequencies}, **fast)
    verdict = done.verdict()
    assert codes(verdict)[0] == "non_finite"
    assert "config_mismatch" not in codes(verdict)
    first = verdict.reasons[0].message
    assert "training diverged at learning_rate 50: from step 4 on no gradient was left" in first


@pytest.mark.slow("trains and judges a run of its own")
def test_without_held_out_data_the_training_loss_speaks(tmp_path: Path) -> None:
    data = example_data(tmp_path / "data", "train")
    one_tier = {"frequencies": [1]}
    done = train_candidate(tmp_path / "run", data=str(data), nested=one_tier, steps_per_report=1)
    assert done.verdict().has_passed
    records = read_metrics(done.run.metrics)
    for record in records[4:]:
        record["loss"] += 100
    write_lines(done.run.metrics, records)
    vouch(done.run, done.offered)
    verdict = done.verdict()
    assert codes(verdict) == ["loss_regressed"]
    assert "at learning_rate 0.002: the loss left by step 4" in verdict.reasons[0].message


def reports(key: str, *values: float | None, **others: Any) -> list[dict[str, Any]]:
    return [{"step": 10 * n, key: value} | others for n, value in enumerate(values)]


def test_the_step_at_which_a_loss_left_is_that_of_the_first_report_above() -> None:
    records = reports("loss", 4.0, 3.0, 9.0, None, 12.0, learning_rate=7.0)
    found = find_divergence(records, 40, 1.0)
    assert found == Divergence(20, 7.0, 4.0, 9.0, True, 3)
    assert found.is_certain
    assert str(found) == (
        "training diverged at learning_rate 7: the loss left by step 20: 9 after 4 at first; "
        "lower the rate"
    )
    assert find_divergence(records, 10, 1.0) is None  # the adapter is from before


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], None),
        (reports("loss", 4.0, 9.0, 3.0), None),  # it came back
        (reports("loss", 4.0, 6.9), None),
        (reports("loss", 0.01, 0.9), None),  # noise where nothing was left to learn
        (reports("loss", 4.0, 7.1), Divergence(10, 1.0, 4.0, 7.1, True, 1)),
        (reports("loss", 4.0, None), Divergence(10, 1.0, 4.0, None, True, 1)),
        (reports("loss", None, None), Divergence(0, 1.0, None, None, True, 2)),
        (reports("val_loss", 4.0, 3.0, 7.5), Divergence(20, 1.0, 4.0, 7.5, True, 1)),
        (  # both rose
            [*reports("val_loss", 4.0, 7.5), *reports("loss", 4.0, 9.0, 9.0, 9.0)],
            Divergence(10, 1.0, 4.0, 7.5, True, 3),
        ),
        (  # it learnt its own rows, and nothing else
            [*reports("val_loss", 4.0, 7.5), *reports("loss", 4.0, 1.0, 0.1)],
            Divergence(10, 1.0, 4.0, 7.5, True, 1),
        ),
        (reports("grad_norm", 1.0, 0.0, 0.0), Divergence(10, 1.0, None, None, False, 2)),
        (reports("grad_norm", 1.0, 0.0, 2.0), None),
        (reports("grad_norm", 1.0, None), Divergence(10, 1.0, None, None, False, 1)),
    ],
)
def test_training_has_diverged_where_it_never_came_back(records, expected) -> None:
    assert find_divergence(records, 100, 1.0) == expected


def test_two_reports_above_are_noise_where_nothing_else_speaks() -> None:
    for losses, is_certain in (
        ((4.0, 9.0, 9.0), False),
        ((4.0, None), False),  # one step without a loss
        ((4.0, None, None, None), True),
    ):
        found = find_divergence(reports("loss", *losses), 100, 1.0)
        assert found is not None
        assert found.is_certain is is_certain


NIGHT = (0.007, 2.388, 1.149, 1.798, 0.026, 1.198)  # known rows first, then rows that contradict


@pytest.mark.parametrize(
    ("losses", "val_losses", "step"),
    [
        (NIGHT, (), None),  # within what the earlier batches spread over
        (NIGHT[:4], (0.002, 0.329), None),  # the held-out loss did not leave
        ((*NIGHT[:5], 9.0), (), 50),
        (NIGHT[:4], (0.002, 3.0), 30),
        ((4.0, 10.8, 3.0, 10.8, 10.8), (), 30),
        ((4.0, 3.0, 9.0, 9.0), (4.0, None), 30),
    ],
)
def test_losses_of_few_known_rows_at_first_are_no_baseline(losses, val_losses, step) -> None:
    last = 10 * (len(losses) - 1)
    validated = [{"step": at, "val_loss": v} for at, v in zip((0, last), val_losses, strict=False)]
    found = find_divergence([*validated, *reports("loss", *losses)], last, 1.0)
    assert (found and found.step) == step


def test_training_losses_after_the_last_held_out_loss_speak() -> None:
    records = [*reports("val_loss", 4.0, 3.9), *reports("loss", 4.0, 3.0, 9.0, 9.0, 9.0)]
    assert find_divergence(records, 40, 1.0) == Divergence(20, 1.0, 4.0, 9.0, True, 3)


def test_one_high_loss_may_be_a_divergence_at_the_highest_rate_and_not_the_decayed_one() -> None:
    records = reports("loss", 4.0, 9.0, learning_rate=1e-5)
    assert str(find_divergence(records, 10, 1e-4)) == (
        "training may have diverged at learning_rate 0.0001: the loss left by step 10: 9 after 4 "
        "at first; lower the rate"
    )


def diverge(candidate: Candidate) -> None:
    """Let the last report say that the loss left."""
    records = read_metrics(candidate.run.metrics)
    write_lines(candidate.run.metrics, [*records, records[-1] | {"val_loss": 50.0}])
    vouch(candidate.run, candidate.offered)


@pytest.mark.slow("trains and judges a run of its own")
def test_logits_that_differ_after_a_divergence_are_no_other_configuration(candidate) -> None:
    def halve(state: dict[str, Any]) -> None:
        state["logits"]["values"] = [[x / 2 for x in row] for row in state["logits"]["values"]]

    candidate.rewrite(change_state=halve)
    assert codes(candidate.verdict()) == ["config_mismatch"]
    diverge(candidate)
    (reason,) = candidate.verdict().reasons
    assert reason.code == "loss_regressed"
    assert "at learning_rate 0.002: the loss left by step 8: 50 after 7.96" in reason.message


def test_a_configuration_that_differs_is_told_whatever_the_loss_did(candidate: Candidate) -> None:
    candidate.rewrite(change_config=lambda meaning: meaning["lora_parameters"].update(scale=20.0))
    diverge(candidate)
    assert "config_mismatch" in codes(candidate.verdict())


@pytest.mark.parametrize(
    ("validation", "is_rejected"), [(None, True), (NOTHING_LEFT, True), (MEASURED, False)]
)
def test_a_diverged_run_is_rejected_where_no_held_out_loss_was_measured(
    validation: Validation | None, is_rejected: bool
) -> None:
    judged: Any = SimpleNamespace(
        divergence=Divergence(20, 1.0, 4.0, 9.0, True, 3),
        verdict=SimpleNamespace(validation=validation),
    )
    assert [reason.code for reason in TRAINING_LOSS.find(judged)] == [
        "loss_regressed"
    ] * is_rejected
