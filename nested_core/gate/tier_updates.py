"""The updates of each tier against its clock, from the checkpoint that the adapter comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nested_core.config.schema import FineTuneConfig
from nested_core.gate.run_evidence import RunEvidence, TierUpdateCounts
from nested_core.optim.gradients import find_gradient_mark
from nested_core.optim.tier_assignment import TierMap, count_expected_updates
from nested_core.optim.tier_counters import COUNTERS_KEY, require_current_layout
from nested_core.optim.tiers_file import read_tiers
from nested_core.records.verdict import TensorChange, TierChange
from nested_core.storage.checkpoint import MASTERS_PREFIX, OPTIMIZER_NAME
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import StoredTensor, read_tensors


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
