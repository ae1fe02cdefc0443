"""What it costs that one of several candidates was chosen on the examples that it is judged on.

The best of K equal candidates looks better than it is. Its interval is widened by the distribution
of the largest of K studentised differences, which is drawn from the candidates' own losses (max-T:
Westfall and Young, Resampling-based multiple testing, 1993; White, A reality check for data
snooping, Econometrica 68, 2000). Steps of one run differ little, so that this costs less than a
division of the 5 % by K, which is what remains where the losses are not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nested_core.records.loss_conclusion import MIN_EXAMPLES
from nested_core.records.losses import ExampleLosses, Vector
from nested_core.records.paired_difference import (
    CONFIDENCE,
    Indices,
    PairedDifference,
    count_drawn,
    student_t_quantile,
    sum_clusters,
)
from nested_core.storage.validation_losses import read_step_losses

RESAMPLES = 4_000  # 100 of them lie beyond the 97.5 % point
_TAIL = (1 - CONFIDENCE) / 2
_MAX_CELLS_AT_ONCE = 4_000_000  # of resamples by candidates: 32 MB


@dataclass(frozen=True, eq=False)
class Candidates:
    """The candidates among which the held-out examples chose the one that is judged.

    count: how many there were: evaluated steps that could be offered, times the points of a sweep.
    lines: the lines of the examples that their losses are of, int64 (n,); None without losses.
    losses: the mean loss of each example with each candidate, in nats/token, float64 (k, n);
        None if not every candidate's losses were kept.
    """

    count: int = 1
    lines: Indices | None = None
    losses: Vector | None = None

    def corrected_interval(
        self, judged: ExampleLosses, other: Vector, found: PairedDifference
    ) -> tuple[float, float] | None:
        """The 95 % interval of `found` that holds for the best of `count`; None for one alone.

        Args:
            judged: the losses of the examples that `found` is of.
            other: losses of the same examples with the adapter that it is compared with.
            found: the difference of the chosen candidate and the other adapter.
        """
        if self.count == 1 or not found.is_measurable:
            return None
        width = self.quantile(judged, other, found.examples) * found.standard_error
        return found.mean - width, found.mean + width

    def quantile(self, judged: ExampleLosses, other: Vector, examples: int) -> float:
        """How many standard errors the corrected interval extends to either side.

        At least that of one candidate alone, and at most that of `count` independent ones.
        """
        alone = student_t_quantile(1 - _TAIL, examples - 1)
        independent = student_t_quantile(1 - _TAIL / self.count, examples - 1)
        if self.lines is None or self.losses is None:
            return independent
        _, own, theirs = np.intersect1d(self.lines, judged.lines, return_indices=True)
        differences = self.losses[:, own] - other[theirs]
        differences = differences[np.isfinite(differences).all(axis=1)]
        weights = judged.tokens[theirs]
        if judged.drawn_clusters is not None:
            clusters = judged.drawn_clusters[theirs]
            differences, weights = sum_clusters(differences, weights, clusters)
        if weights.size < MIN_EXAMPLES or not len(differences):
            return independent
        return max(alone, min(independent, max_t_quantile(differences, weights)))


def read_candidates(validation_losses: Path) -> Candidates:
    """The evaluated steps of a run that could be offered, with their losses where all were kept."""
    steps = read_step_losses(validation_losses)
    lines = steps[0].lines if steps else None
    if lines is None or any(own.lines != lines for own in steps):
        return Candidates(max(1, len(steps)))
    losses = [[np.nan if loss is None else loss for loss in own.losses or ()] for own in steps]
    return Candidates(len(steps), np.array(lines, np.int64), np.array(losses, np.float64))


def max_t_quantile(differences: Vector, weights: Vector) -> float:
    """The 97.5 % point of the largest studentised difference of several, below 0, by chance alone.

    Args:
        differences: of each candidate and example, (k, n); candidates that equal the other adapter
            in all of them are passed over.
        weights: of the examples, (n,).

    Each resample's differences are divided by its own standard error, which keeps the level with
    few examples (the bootstrap-t; Davison and Hinkley, 1997, section 5.2.1). Infinite where more
    than 2.5 % of the resamples have no spread.
    """
    means = differences @ weights / weights.sum()
    centred = differences - means[:, None]
    centred = centred[np.abs(centred).max(axis=1) > 0]
    if not len(centred):
        return 0.0
    examples = weights.size
    columns = np.concatenate([weights * centred, (weights * centred) ** 2, weights**2 * centred])
    count = len(centred)
    largest: list[Vector] = []
    for drawn in count_drawn(examples, RESAMPLES):
        rows = max(1, _MAX_CELLS_AT_ONCE // (4 * count))
        for start in range(0, len(drawn), rows):
            counts = drawn[start : start + rows].astype(np.float64)
            largest.append(_largest_statistics(counts, columns, weights, count))
    return float(np.quantile(np.concatenate(largest), 1 - _TAIL, method="higher"))


def _largest_statistics(counts: Vector, columns: Vector, weights: Vector, count: int) -> Vector:
    """Of each resample, the largest fall in its own standard errors, over `count` candidates."""
    sums = counts @ columns.T
    totals = (counts @ weights)[:, None]
    means = sums[:, :count] / totals
    squares = (counts @ weights**2)[:, None]
    spread = sums[:, count : 2 * count] - 2 * means * sums[:, 2 * count :] + means**2 * squares
    examples = weights.size
    errors = np.sqrt(np.maximum(spread, 0) * (examples / (examples - 1))) / totals
    with np.errstate(divide="ignore", invalid="ignore"):
        statistics = np.where(means == 0, 0.0, -means / errors)
    largest: Vector = statistics.max(axis=1)
    return largest
