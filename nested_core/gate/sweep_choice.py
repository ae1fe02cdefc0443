"""What a sweep's choice is worth where the examples that chose it judge it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nested_core.gate.chosen_candidate import Candidates, join_candidates, read_candidates
from nested_core.gate.example_losses import read_example_losses
from nested_core.records.verdict_file import read_verdict
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.loss_format import format_interval


@dataclass(frozen=True)
class SweepChoice:
    """The run that a sweep chose, and among how many candidates its examples chose it.

    chosen_among: the evaluated steps of all its runs; 1 where the gate's examples chose nothing.
    corrected_interval: the 95 % interval of its loss less the champion's, or less that of the
        adapter that it began from where there is no champion, which holds for the best of so many;
        None for one alone, and without losses to compare.
    """

    chosen_among: int
    corrected_interval: tuple[float, float] | None

    @classmethod
    def read(cls, chosen: RunDirectory, runs: Sequence[RunDirectory]) -> SweepChoice:
        """From the folders of the chosen run and of all runs, the chosen one among them."""
        validation = read_verdict(chosen.gate).validation
        if validation is None:
            return cls(1, None)
        is_validation_set = validation.selected_on_same_data or validation.file == "valid.jsonl"
        if not is_validation_set and validation.chosen_among == 1:
            return cls(1, None)
        family = join_candidates([_read_candidates_of_run(run) for run in runs])
        losses = read_example_losses(chosen.gate_losses).counted()
        shared = losses.examples_with_champion_loss()
        judged, other = (losses, losses.before)
        if shared.champion is not None and len(shared):
            judged, other = (shared, shared.champion)
        found = judged.compare_trained_with(other)
        interval = None if found is None else family.corrected_interval(judged, other, found)
        return cls(family.count, interval)

    def why_not_better(self) -> str | None:
        """Why the choice may be luck, or None where it is not."""
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


def _read_candidates_of_run(run: RunDirectory) -> Candidates:
    """Its evaluated steps; of a run that offers its last step, the one that the gate judged."""
    candidates = read_candidates(run.validation_losses)
    if candidates.losses is not None or candidates.count > 1 or not run.gate_losses.is_file():
        return candidates
    losses = read_example_losses(run.gate_losses)
    return Candidates(1, losses.lines, losses.after[None])
