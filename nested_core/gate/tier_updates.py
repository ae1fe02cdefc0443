"""The updates of each tier against its clock, from the checkpoint that the adapter comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from nested_core.backend import to_float
from nested_core.config.schema import FineTuneConfig
from nested_core.gate.run_evidence import RunEvidence, TierUpdateCounts
from nested_core.gate.verdict import Reason, TensorChange, TierChange
from nested_core.optim.gradient_checks import find_gradient_mark
from nested_core.optim.learning_rate_schedules import build_learning_rate
from nested_core.optim.tier_assignment import TierMap, count_expected_updates
from nested_core.optim.tier_counters import COUNTERS_KEY, require_current_layout
from nested_core.optim.tiers_file import read_tiers
from nested_core.storage.checkpoint import MASTERS_PREFIX, OPTIMIZER_NAME
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import StoredTensor, read_tensors

# Adam moves a weight by about the rate, and float32 numbers near 0.01 are 1e-9 apart.
SMALLEST_USEFUL_RATE = 1e-9
MAX_SAMPLED_STEPS = 1000


@dataclass(frozen=True)
class TierEvidence:
    """What a checkpoint says of the tiers: their map, their counts, the optimizer's state."""

    tiers: TierMap
    step: int
    flush_steps: Sequence[int]
    counts: Sequence[TierUpdateCounts]
    optimizer_state: dict[str, StoredTensor]
    initial: dict[str, StoredTensor]

    @classmethod
    def collect(
        cls, config: FineTuneConfig, run: RunDirectory, evidence: RunEvidence
    ) -> TierEvidence:
        """Read it from the run directory and its verified checkpoint."""
        optimizer_state = read_tensors(evidence.checkpoint.path / OPTIMIZER_NAME)
        layout = optimizer_state.get(f"{COUNTERS_KEY}.layout")
        require_current_layout(None if layout is None else layout.to_mlx())
        return cls(
            read_tiers(run.tiers),
            evidence.checkpoint.step,
            evidence.record.flush_steps,
            evidence.record.tiers,
            optimizer_state,
            evidence.before.tensors,
        )

    def had_gradient(self, name: str) -> bool:
        """Whether an update was applied to a parameter with a gradient that was not zero."""
        evidence = find_gradient_mark(self.optimizer_state, name)
        return evidence is not None and bool(np.frombuffer(evidence.data, np.uint8).any())

    def is_missing_its_updates(self, name: str) -> bool:
        """Whether a parameter that stayed as it was had gradients, and no master that moved.

        A float32 master may move by less than the dtype that the parameter is published in can say.
        """
        master = self.optimizer_state.get(MASTERS_PREFIX + name)
        before = self.initial[name].to_numpy()
        has_moved = master is not None and not np.array_equal(master.to_numpy(), before)
        return self.had_gradient(name) and not has_moved


def tier_changes(evidence: TierEvidence, changes: Sequence[TensorChange]) -> list[TierChange]:
    """The rows of the tier table."""
    rows = []
    for tier, frequency in enumerate(evidence.tiers.frequencies):
        own = [change for change in changes if change.tier == tier]
        expected = count_expected_updates(evidence.step, frequency, evidence.flush_steps)
        counts = evidence.counts[tier]
        moved = sum(change.changed for change in own)
        rows.append(
            TierChange(tier, frequency, len(own), moved, expected, counts.updates, counts.skipped)
        )
    return rows


def update_reasons(
    config: FineTuneConfig,
    evidence: TierEvidence,
    rows: Sequence[TierChange],
    changes: Sequence[TensorChange],
) -> list[Reason]:
    """Tiers that stayed as they were, updates that are not accounted for or left no trace."""
    reasons = []
    for row in rows:
        own = [change for change in changes if change.tier == row.tier]
        reasons += _tier_reasons(config, evidence, row, own)
    return reasons


def _tier_reasons(
    config: FineTuneConfig, evidence: TierEvidence, row: TierChange, own: Sequence[TensorChange]
) -> list[Reason]:
    label = f"tier {row.tier} (every {row.frequency})"
    names = tuple(change.name for change in own)
    reasons = []
    if row.applied_updates + row.skipped_updates != row.expected_updates:
        message = (
            f"{label}: {row.expected_updates} updates were due by step {evidence.step}, "
            f"{row.applied_updates} were applied and {row.skipped_updates} skipped"
        )
        reasons.append(Reason("updates_missing", message, names))
    if row.skipped_updates > config.gate.max_skipped_share * row.expected_updates:
        message = (
            f"{label}: {row.skipped_updates} of {row.expected_updates} updates were skipped for "
            f"non-finite gradients; gate.max_skipped_share is {config.gate.max_skipped_share:g}"
        )
        reasons.append(Reason("updates_missing", message, names))
    if not row.changed or not any(map(evidence.had_gradient, names)):
        return [*reasons, Reason("tier_unchanged", f"{label}: nothing was trained", names)]
    if row.applied_updates and _had_positive_learning_rate(config, evidence, row):
        traceless = [
            c.name for c in own if not c.changed and evidence.is_missing_its_updates(c.name)
        ]
        if traceless:
            why = _why_updates_left_no_trace(config, evidence, row)
            noun = "tensor" if len(traceless) == 1 else "tensors"
            message = (
                f"{label}: {len(traceless)} {noun} had gradients and stayed as they were; {why}"
            )
            reasons.append(Reason("updates_missing", message, tuple(traceless)))
    return reasons


def _why_updates_left_no_trace(
    config: FineTuneConfig, evidence: TierEvidence, row: TierChange
) -> str:
    """The likely cause and what to do: a learning rate too small for float32, or lost updates."""
    rate = build_learning_rate(config)
    if callable(rate):
        due = range(row.frequency, evidence.step + 1, row.frequency)
        sampled = due[:: max(1, len(due) // MAX_SAMPLED_STEPS)]
        highest = max(to_float(rate(mx.array(step - 1))) for step in sampled)
    else:
        highest = rate
    if highest < SMALLEST_USEFUL_RATE:
        return (
            f"a learning rate of {highest:.3g} is too small to move a float32 weight: raise "
            f"learning_rate (1e-4 is usual for LoRA)"
        )
    return "the updates were computed and lost before they reached the weights"


def _had_positive_learning_rate(
    config: FineTuneConfig, evidence: TierEvidence, row: TierChange
) -> bool:
    """Whether the learning rate was above 0 at one of the tier's due steps at least."""
    rate = build_learning_rate(config)
    if not callable(rate):
        return rate > 0
    due = range(row.frequency, evidence.step + 1, row.frequency)
    return bool(evidence.flush_steps) or any(to_float(rate(mx.array(step - 1))) > 0 for step in due)
