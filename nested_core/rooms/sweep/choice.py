"""The run that a sweep chose, compared with luck counted, by the losses that its runs kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nested_core.measure.losses.chosen_candidate import Candidates, read_candidates
from nested_core.records.losses import ExampleLosses, Vector, read_example_losses
from nested_core.records.paired_difference import PairedDifference
from nested_core.records.verdict_file import read_verdict
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.loss_format import format_interval


def join_candidates(several: Sequence[Candidates]) -> Candidates:
    """The candidates of all runs of a sweep as one family, on the examples that all have read."""
    count = sum(own.count for own in several)
    read = [(own.contents, own.losses) for own in several]
    if any(contents is None or losses is None for contents, losses in read):
        return Candidates(count)
    known = [(c, losses) for c, losses in read if c is not None and losses is not None]
    shared = known[0][0]
    for others, _ in known[1:]:
        shared = np.intersect1d(shared, others)
    parts = []
    for own, losses in known:
        _, place, _ = np.intersect1d(own, shared, return_indices=True)
        parts.append(losses[:, place])
    return Candidates(count, np.unique(shared), np.concatenate(parts))


@dataclass(frozen=True)
class SweepChoice:
    """The run that a sweep chose, and among how many candidates its examples chose it.

    chosen_among: the evaluated steps of all its runs; 1 where the gate's examples chose nothing.
    corrected_interval: the 95 % interval of its loss less the champion's, or less that of the
        adapter that it began from where there is no champion, which holds for the best of so many;
        None for one alone, and without losses to compare.
    difference: what the interval is of, and its own; None without losses to compare.
    """

    chosen_among: int
    corrected_interval: tuple[float, float] | None
    difference: PairedDifference | None = None

    @classmethod
    def read(
        cls,
        chosen: RunDirectory,
        runs: Sequence[RunDirectory],
        baseline: RunDirectory | None = None,
    ) -> SweepChoice:
        """From the folders of the chosen run and of all runs, the chosen one among them.

        With `baseline`, the folder of another judged run of the sweep, its losses are those of that
        run's adapter on the same examples, and not the champion's.
        """
        validation = read_verdict(chosen.gate).validation
        if validation is None:
            return cls(1, None)
        losses = read_example_losses(chosen.gate_losses).counted()
        if baseline is None:
            judged = losses.examples_with_champion_loss()
            other = judged.champion
            if other is None or not len(judged):
                judged, other = (losses, losses.before)
        else:
            judged, other = losses, _read_losses_of_same_examples(baseline, losses)
        found = judged.compare_trained_with(other)
        is_validation_set = validation.selected_on_same_data or validation.file == "valid.jsonl"
        if not is_validation_set and validation.chosen_among == 1:
            return cls(1, None, found)
        family = join_candidates([_read_candidates_of_run(run) for run in runs])
        interval = None if found is None else family.corrected_interval(judged, other, found)
        return cls(family.count, interval, found)

    def why_not_better(self) -> str | None:
        """Why the choice may be luck; None for a choice that is shown to be better."""
        if self.chosen_among == 1:
            return None
        among = f"the best of {self.chosen_among} candidates on the examples that chose it"
        if self.corrected_interval is None:
            return f"{among}: too few examples to tell it from luck"
        if self.corrected_interval[1] < 0:
            return None
        interval = format_interval(self.corrected_interval)
        return (
            f"{among}: the 95 % interval corrected for that is {interval}; a test.jsonl sees more"
        )


def _read_losses_of_same_examples(run: RunDirectory, judged: ExampleLosses) -> Vector:
    """The losses of a run's adapter on the examples of another; NaN for one that it has not."""
    losses = read_example_losses(run.gate_losses)
    by_line = dict(zip(losses.lines.tolist(), losses.after.tolist(), strict=True))
    return np.array([by_line.get(line, np.nan) for line in judged.lines.tolist()], np.float64)


def _read_candidates_of_run(run: RunDirectory) -> Candidates:
    """Its evaluated steps; of a run that offers its last step, the one that the gate judged."""
    candidates = read_candidates(run.validation_losses)
    if candidates.losses is not None or candidates.count > 1 or not run.gate_losses.is_file():
        return candidates
    losses = read_example_losses(run.gate_losses)
    return Candidates(1, losses.contents, losses.after[None])
