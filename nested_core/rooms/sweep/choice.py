"""The run that a sweep chose, compared with luck counted, by the losses that its runs kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nested_core.measure.losses.chosen_candidate import Candidates, read_candidates
from nested_core.records.losses import Contents, read_example_losses
from nested_core.records.paired_difference import PairedDifference
from nested_core.records.verdict_file import read_verdict
from nested_core.storage.run_directory import RunDirectory


def join_candidates(several: Sequence[Candidates]) -> Candidates:
    """Return the candidates of all runs of a sweep as one family, which read the same examples."""
    count, first = sum(own.count for own in several), several[0]
    losses = [
        own.losses
        for own in several
        if own.losses is not None and np.array_equal(own.contents, first.contents)  # type: ignore[arg-type]
    ]
    if len(losses) < len(several):
        return Candidates(count)
    return Candidates(count, first.contents, np.concatenate(losses))


@dataclass(frozen=True)
class SweepChoice:
    """The run that a sweep chose, and among how many candidates its examples chose it.

    chosen_among: the evaluated steps of all its runs; 1 where the gate's examples chose nothing.
    corrected_interval: the 95 % interval of its loss less that of the first run, the configuration
        itself, which holds for the best of so many; None for one alone, and without losses to
        compare.
    difference: what the interval is of, and its own; None without losses to compare.
    """

    chosen_among: int
    corrected_interval: tuple[float, float] | None
    difference: PairedDifference | None = None

    @classmethod
    def read(
        cls, chosen: RunDirectory, runs: Sequence[RunDirectory], selecting: Contents
    ) -> SweepChoice:
        """Compare the chosen run with the first one by their losses on held-out examples.

        The interval is corrected for the choice among all evaluated steps of all runs, unless the
        examples are others than those that the choice was made by.

        runs: all runs, the chosen one among them.
        selecting: the digests of the examples that the arms were evaluated on, uint64 (n,).
        """
        if read_verdict(chosen.gate).validation is None:
            return cls(1, None)
        judged = read_example_losses(chosen.gate_losses).counted()
        # The first run's losses on the same examples; NaN for one that it has not
        losses = read_example_losses(runs[0].gate_losses)
        by_line = dict(zip(losses.lines.tolist(), losses.after.tolist(), strict=True))
        first = np.array([by_line.get(line, np.nan) for line in judged.lines.tolist()], np.float64)
        change = judged.compare_trained_with(first)
        if judged.contents is not None and not np.isin(judged.contents, selecting).any():
            return cls(1, None, change)
        family = join_candidates([_read_candidates_of_run(run) for run in runs])
        interval = None if change is None else family.corrected_interval(judged, first, change)
        return cls(family.count, interval, change)


def _read_candidates_of_run(run: RunDirectory) -> Candidates:
    """Read its evaluated steps; of a run that offers its last step, the one that was judged."""
    candidates = read_candidates(run.validation_losses)
    if candidates.losses is not None or candidates.count > 1 or not run.gate_losses.is_file():
        return candidates
    losses = read_example_losses(run.gate_losses)
    return Candidates(1, losses.contents, losses.after[None])
