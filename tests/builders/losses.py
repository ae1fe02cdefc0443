"""Losses of held-out examples that a test chooses, and what a verdict makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from nested_core.config.sections import GateSection
from nested_core.measure.losses.loss_figures import summarise_losses
from nested_core.records.losses import ExampleLosses
from nested_core.records.verdict import Validation


def losses_of(differences: Any, before: float = 1.0, **columns: Any) -> ExampleLosses:
    """Examples of 10 tokens, all with one loss before, which changed by these differences."""
    after = before + np.asarray(differences, np.float64)
    lines, tokens = np.arange(1, len(after) + 1), np.full(len(after), 10.0)
    losses_before = np.full(len(after), before)
    columns.setdefault("contents", lines.astype(np.uint64))
    return ExampleLosses("valid.jsonl", lines, tokens, losses_before, after, **columns)


def validation_of(losses: ExampleLosses, **bounds: Any) -> Validation:
    """The comparison of a verdict, where the same examples chose the step."""
    return summarise_losses(losses, GateSection(**bounds), selected_on_same_data=True)
