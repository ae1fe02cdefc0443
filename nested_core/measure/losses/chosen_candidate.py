"""Correct the confidence interval of a candidate that was selected on the examples that judge it.

The best of K equal candidates looks better than it is. Its interval is widened by the distribution
of the largest of K studentised differences, which is drawn from the candidates' own losses (max-T:
Westfall and Young, Resampling-based multiple testing, 1993; White, A reality check for data
snooping, Econometrica 68, 2000). Steps of one run differ little, so this widens the interval less
than dividing the 5 % by K, which is done if the candidates' losses were not recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nested_core.records.loss_conclusion import MIN_EXAMPLES
from nested_core.records.losses import Contents, ExampleLosses, Vector
from nested_core.records.paired_difference import (
    CONFIDENCE,
    PairedDifference,
    count_drawn,
    student_t_quantile,
    sum_clusters,
)
from nested_core.storage.validation_losses import read_step_losses

RESAMPLES = 4_000  # 100 of them lie beyond the 97.5 % point
_TAIL = (1 - CONFIDENCE) / 2
_MAX_CELLS_AT_ONCE = 4_000_000  # float64 numbers of a (resamples, candidates) array: 32 MB


@dataclass(frozen=True, eq=False)
class Candidates:
    """The candidates from which the held-out examples selected the one that is judged.

    count: their number: evaluated steps that could be offered, times the points of a sweep.
    contents: the digest of each example's content, uint64 (n,); None without losses.
    losses: the mean loss of each example with each candidate, in nats/token, float64 (k, n); None
        if the losses of some candidate were not recorded.
    """

    count: int = 1
    contents: Contents | None = None
    losses: Vector | None = None

    def corrected_interval(
        self, judged: ExampleLosses, other: Vector, difference: PairedDifference
    ) -> tuple[float, float] | None:
        """Return the 95 % interval of a difference, widened for selection; None for one candidate.

        Args:
            judged: the losses of the examples that were compared.
            other: losses of the same examples with the adapter compared with.
            difference: the difference between the selected candidate and the other adapter.
        """
        if self.count == 1 or not difference.is_measurable:
            return None
        width = self.quantile(judged, other, difference.examples) * difference.standard_error
        return difference.mean - width, difference.mean + width

    def quantile(self, judged: ExampleLosses, other: Vector, examples: int) -> float:
        """Return how many standard errors the corrected interval extends to either side.

        The best of several training steps looks better than it is on the examples that selected it,
        so its interval must be wider.

        judged: the trained adapter's losses. other: those of the adapter compared with.
        examples: the number of independent examples.

        Returns at least the quantile for a single candidate, and at most that for `count`
        independent ones.
        """
        lower_bound = student_t_quantile(1 - _TAIL, examples - 1)
        upper_bound = student_t_quantile(1 - _TAIL / self.count, examples - 1)
        if self.contents is None or self.losses is None or judged.contents is None:
            return upper_bound
        # Only examples that both selected the step and judge it now can correct for the selection.
        _, columns, rows = np.intersect1d(self.contents, judged.contents, return_indices=True)
        differences = self.losses[:, columns] - other[rows]
        differences = differences[np.isfinite(differences).all(axis=1)]
        weights = judged.tokens[rows]
        if judged.drawn_clusters is not None:
            differences, weights = sum_clusters(differences, weights, judged.drawn_clusters[rows])
        if weights.size < MIN_EXAMPLES or not len(differences):
            return upper_bound
        return max(lower_bound, min(upper_bound, max_t_quantile(differences, weights)))


def read_candidates(validation_losses: Path, *, are_ties: bool = False) -> Candidates:
    """Read the evaluated steps that a run could offer, with their losses if all were recorded.

    are_ties: only those with the fewest wrong answers, among which the loss chose.
    """
    steps = read_step_losses(validation_losses)
    if are_ties:
        fewest = min((one.wrong for one in steps), default=0.0)
        steps = [one for one in steps if one.wrong == fewest]
    contents = steps[0].contents if steps else None
    if contents is None or any(step.contents != contents for step in steps):
        return Candidates(max(1, len(steps)))
    losses = [[np.nan if loss is None else loss for loss in step.losses or ()] for step in steps]
    return Candidates(len(steps), np.array(contents, np.uint64), np.array(losses, np.float64))


def max_t_quantile(differences: Vector, weights: Vector) -> float:
    """Return how many standard errors the best of several equal candidates falls by chance.

    The 97.5 % point of the largest t statistic, by a bootstrap over the examples (max-t): where
    no candidate is better than the other adapter, the best of them looks better by more than this
    in 2.5 % of cases.

    Args:
        differences: candidate minus other adapter, of each candidate and example, (k, n).
            Candidates that equal the other adapter on all examples are ignored.
        weights: of the examples, (n,).

    Each resample's differences are divided by its own standard error, which keeps the level with
    few examples (the bootstrap-t; Davison and Hinkley, 1997, section 5.2.1). Infinite if more than
    2.5 % of the resamples have no spread.
    """
    means = differences @ weights / weights.sum()
    centred = differences - means[:, None]
    centred = centred[np.abs(centred).max(axis=1) > 0]
    if not len(centred):
        return 0.0
    # The terms of each resample's mean and standard error. Multiplied by how often an example was
    # drawn, they give the sums of all resamples in one matrix product.
    examples = weights.size
    columns = np.concatenate([weights * centred, (weights * centred) ** 2, weights**2 * centred])
    count = len(centred)
    largest: list[Vector] = []
    for draw_counts in count_drawn(examples, RESAMPLES):
        rows = max(1, _MAX_CELLS_AT_ONCE // (4 * count))
        for start in range(0, len(draw_counts), rows):
            counts = draw_counts[start : start + rows].astype(np.float64)
            largest.append(_largest_statistics(counts, columns, weights, count))
    return float(np.quantile(np.concatenate(largest), 1 - _TAIL, method="higher"))


def _largest_statistics(counts: Vector, columns: Vector, weights: Vector, count: int) -> Vector:
    """Return for each resample the largest studentised fall over the candidates, (resamples,).

    counts: how often each example was drawn, (resamples, examples).
    columns: weighted differences, their squares, and differences times squared weights, of each of
        the `count` candidates in turn, (3 * count, examples).
    """
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
