"""The last losses of a run in words: the same on a terminal, in a log and in a page."""

from __future__ import annotations

from collections.abc import Sequence

from nested_core.text.loss_format import format_loss
from nested_core.training.training_plan import TrainingPlan

StepLoss = tuple[int, float | None]  # None: not finite


def describe_training_loss(last: StepLoss, plan: TrainingPlan | None) -> str:
    """`training loss 0.1234 (train.jsonl, mean since the last report, step 40)`."""
    step, loss = last
    data = [] if plan is None else [plan.training_file]
    return _describe_loss(
        "training loss", loss, [*data, "mean since the last report", f"step {step:,}"]
    )


def describe_validation_loss(
    last: StepLoss, lowest: StepLoss | None, plan: TrainingPlan | None
) -> str:
    """`validation loss 0.2345 (valid.jsonl, 10 examples, step 40), lowest 0.1999 (step 30)`."""
    step, loss = last
    data = []
    if plan is not None and plan.validation_file is not None:
        data.append(plan.describe_validation())
    text = _describe_loss("validation loss", loss, [*data, f"step {step:,}"])
    if lowest is None or lowest[0] == step:
        return text
    return f"{text}, {_describe_loss('lowest', lowest[1], [f'step {lowest[0]:,}'])}"


def _describe_loss(name: str, loss: float | None, details: Sequence[str]) -> str:
    return f"{name} {format_loss(loss)} ({', '.join(details)})"
