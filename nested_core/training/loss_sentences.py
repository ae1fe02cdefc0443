"""The last losses of a run in words: the same on a terminal, in a log and in a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from nested_core.text.loss_format import format_loss
from nested_core.training.training_plan import TrainingPlan

StepLoss = tuple[int, float | None]  # None: not finite


def describe_last_losses(
    records: Sequence[Mapping[str, Any]], plan: TrainingPlan | None
) -> dict[str, str]:
    """`training loss` and `validation loss` of metrics.jsonl, each as below where there is one."""
    described = {}
    report = next((r for r in reversed(records) if "loss" in r), None)
    if report is not None:
        last = (report["step"], report["loss"])
        described["training loss"] = describe_training_loss(last, plan)
    losses = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    if losses:
        finite = [point for point in losses if point[1] is not None]
        lowest = min(finite, key=itemgetter(1), default=None)
        described["validation loss"] = describe_validation_loss(losses[-1], lowest, plan)
    return described


def join_last_losses(records: Sequence[Mapping[str, Any]], plan: TrainingPlan | None) -> str:
    """Both in a line, or that there is none yet."""
    losses = describe_last_losses(records, plan)
    return "; ".join(f"{name} {text}" for name, text in losses.items()) or "no report yet"


def describe_training_loss(last: StepLoss, plan: TrainingPlan | None) -> str:
    """`0.1234 (train.jsonl, mean since the last report, step 40)`."""
    step, loss = last
    data = [] if plan is None else [plan.training_file]
    return _describe_loss(loss, [*data, "mean since the last report", f"step {step:,}"])


def describe_validation_loss(
    last: StepLoss, lowest: StepLoss | None, plan: TrainingPlan | None
) -> str:
    """`0.2345 (valid.jsonl, 10 examples, step 40), lowest 0.1999 (step 30)`."""
    step, loss = last
    data = []
    if plan is not None and plan.validation_file is not None:
        data.append(plan.describe_validation())
    text = _describe_loss(loss, [*data, f"step {step:,}"])
    if lowest is None or lowest[0] == step:
        return text
    return f"{text}, lowest {_describe_loss(lowest[1], [f'step {lowest[0]:,}'])}"


def _describe_loss(loss: float | None, details: Sequence[str]) -> str:
    return f"{format_loss(loss)} ({', '.join(details)})"
