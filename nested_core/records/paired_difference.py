"""The mean difference of paired values, with its bootstrap interval.

Two adapters are compared on the same examples. The difference is taken example by example, so that
what makes an example hard for both cancels. Its 95 % interval is a bootstrap over independent
examples: those of one cluster, such as rows with the same prompt, are resampled together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from nested_core.records.loss_conclusion import MIN_EXAMPLES

CONFIDENCE = 0.95
ONE_SIDED_CONFIDENCE = 0.9  # of both sides: 5 % lie beyond either end
MIN_ROWS_OF_FEW_CLUSTERS = 20  # so many rows of fewer clusters than MIN_EXAMPLES are drawn singly
RESAMPLES = 10_000
SEED = 20_251_121
_MAX_DRAWS = 100_000_000  # in all: a very large set is resampled less often
_DRAWS_AT_ONCE = 2_000_000  # 16 MB of indices
_MAX_SUMMED_DEGREES = 1_000
_BISECTIONS = 60
_NORMAL_DISTRIBUTION = NormalDist()
Vector = np.typing.NDArray[np.float64]
Indices = np.typing.NDArray[np.int64]
Counts = np.typing.NDArray[np.float32]
Values = Sequence[float] | Vector


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference of paired values: below 0 if the second value is smaller on average.

    examples: how many independent pairs there are; those of one cluster count as one.
    mean: the weighted mean of second minus first, in the unit of the values.
    standard_error: the standard error of the mean, from the spread of the differences.
    low, high: the ends of the 95 % interval; infinite with fewer than MIN_EXAMPLES examples.
    one_sided_low, one_sided_high: the ends of the one-sided 95 % intervals, for a claim about one
        side such as "the loss rose by no more than a margin". Each is the farther of the
        bootstrap's and Student's t, because with 10 examples and heavy tails either alone is too
        narrow.
    """

    examples: int
    mean: float
    standard_error: float
    low: float
    high: float
    one_sided_low: float = -math.inf
    one_sided_high: float = math.inf

    @property
    def is_measurable(self) -> bool:
        """Whether there are enough examples for an interval."""
        return self.examples >= MIN_EXAMPLES

    @property
    def smallest_visible(self) -> float:
        """The smallest mean difference that would be significant: half the interval's width."""
        return (self.high - self.low) / 2

    def is_above(self, bound: float) -> bool:
        """Return whether the whole 95 % interval lies above `bound`."""
        return self.low > bound

    def is_below(self, bound: float) -> bool:
        """Return whether the whole 95 % interval lies below `bound`."""
        return self.high < bound

    def to_json(self) -> dict[str, object]:
        """Return difference, standard error and interval as JSON values.

        The last two are null with too few examples.
        """
        interval = [self.low, self.high] if self.is_measurable else None
        error = self.standard_error if self.is_measurable else None
        return {"difference": self.mean, "standard_error": error, "interval": interval}


def compare_pairs(
    first: Values, second: Values, weights: Values | None = None, clusters: Indices | None = None
) -> PairedDifference:
    """Compare two values of each example, such as losses before and after, with a 95 % interval.

    first, second: the two values of each example, (n,).
    weights: the weight of each example, all above 0, (n,); None weighs all alike. With mean losses
        as values and supervised tokens as weights, the result is the difference of two mean losses
        per token.
    clusters: the cluster number of each example, int64 (n,). Examples of one cluster are resampled
        together, as one example of their summed weight (Davison and Hinkley, Bootstrap Methods,
        1997, section 3.8).

    The mean is sum(w * (second - first)) / sum(w). The interval is the expanded percentile interval
    of the bootstrap (Hesterberg, "What teachers should know about the bootstrap", The American
    Statistician 69, 2015, section 3.2); the plain one is too narrow by what Student's t adds to a
    normal distribution, and by sqrt((n - 1) / n). benchmarks/gate.md has its measured coverage
    beside four others'.

    Raises ValueError for no examples, vectors of unequal lengths, values that are not finite, and
    weights that are not above 0.
    """
    # From here on: `counts` is the weight of each example, (n,)
    counts = np.ones(len(first)) if weights is None else np.asarray(weights, np.float64)
    if not len(first) == len(second) == counts.size > 0:
        raise ValueError(f"expected as many of each: {len(first)}, {len(second)} and {counts.size}")
    pairs = np.array([first, second], np.float64)
    if not np.isfinite(pairs).all() or not (np.isfinite(counts) & (counts > 0)).all():
        raise ValueError("values must be finite, and weights finite and above 0")
    # Differences, one for each independent example
    differences = pairs[1] - pairs[0]
    is_weighted = weights is not None
    if clusters is not None and len(np.unique(clusters)) < counts.size:
        differences, counts = sum_clusters(differences[None], counts, clusters)
        differences, is_weighted = differences[0], True
    examples = counts.size
    mean = float(counts @ differences / counts.sum())
    if examples < MIN_EXAMPLES:
        return PairedDifference(examples, mean, math.inf, -math.inf, math.inf)
    # Standard error, and the bootstrap's expanded percentile intervals
    residuals = counts * (differences - mean)
    variance = float(residuals @ residuals) * examples / (examples - 1)
    means = _resampled_means(differences, counts if is_weighted else None)
    tails = [_tail_probability(examples, share) for share in (CONFIDENCE, ONE_SIDED_CONFIDENCE)]
    # Low and high end of the two-sided interval, then of the one-sided ones
    ends = np.quantile(means, [end for tail in tails for end in (tail, 1 - tail)])
    low, high, lower, upper = map(float, ends)
    error = math.sqrt(variance) / float(counts.sum())
    # One-sided ends: the farther of the bootstrap's and Student's t
    width = student_t_quantile((1 + ONE_SIDED_CONFIDENCE) / 2, examples - 1) * error
    one_sided = (min(lower, mean - width), max(upper, mean + width))
    return PairedDifference(examples, mean, error, low, high, *one_sided)


def sum_clusters(values: Vector, weights: Vector, clusters: Indices) -> tuple[Vector, Vector]:
    """Aggregate values by cluster: return each cluster's weighted means and its summed weight.

    values: (k, n); weights and clusters: (n,).

    Returns means (k, clusters) and weights (clusters,).
    """
    _, cluster_index = np.unique(clusters, return_inverse=True)
    totals = np.bincount(cluster_index, weights).astype(np.float64)
    sums = np.array([np.bincount(cluster_index, weights * row) for row in values], np.float64)
    return sums / totals, totals


def independent_clusters(clusters: Indices | None) -> Indices | None:
    """Return the clusters that the bootstrap should resample; None to resample single rows.

    Single rows are resampled if no two share a cluster, and if MIN_ROWS_OF_FEW_CLUSTERS rows or
    more have fewer than MIN_EXAMPLES clusters, such as many rows with one instruction.
    """
    if clusters is None:
        return None
    distinct = len(np.unique(clusters))
    if distinct == len(clusters) or has_too_few_clusters(clusters):
        return None
    return clusters


def has_too_few_clusters(clusters: Indices | None) -> bool:
    """Return whether there are many rows but too few clusters to resample by cluster."""
    if clusters is None or len(clusters) < MIN_ROWS_OF_FEW_CLUSTERS:
        return False
    return len(np.unique(clusters)) < MIN_EXAMPLES


def smallest_visible_share(examples: int, chance: float = (1 - CONFIDENCE) / 2) -> float:
    """Return the smallest share of right answers whose loss is significant, without any gain.

    examples: the number of questions, each scored 0 or 1.
    chance: the one-sided significance level. The one-sided mid-p value of k lost and 0 won is 2 **
        -(k + 1), which has to be at most `chance`.

    Returns 1.0 if even the loss of all answers would not be significant.
    """
    lost = math.ceil(-math.log2(chance)) - 1
    return 1.0 if examples < max(MIN_EXAMPLES, lost) else lost / examples


def _resampled_means(values: Vector, weights: Vector | None) -> Vector:
    """Return the weighted mean of each bootstrap resample of the values, with a fixed seed."""
    examples = values.size
    resamples = count_resamples(examples)
    # Float32 adds such integers without rounding
    are_whole = (values == np.round(values)).all() and np.abs(values).max() < 2**20
    if weights is None and examples * resamples <= _DRAWS_AT_ONCE and are_whole:
        # Sums of whole numbers, as of right and wrong answers, are exact in any order.
        counts = _count_all_resamples(examples, resamples, SEED)
        return (counts @ values.astype(np.float32)).astype(np.float64) / examples
    sums = values if weights is None else values * weights
    means = np.empty(resamples)
    start = 0
    for drawn in draw_resamples(examples, resamples):
        total = examples if weights is None else weights.take(drawn).sum(axis=1)
        means[start : start + len(drawn)] = sums.take(drawn).sum(axis=1) / total
        start += len(drawn)
    return means


def count_resamples(examples: int) -> int:
    """Return how many bootstrap resamples to draw from this many examples."""
    return min(RESAMPLES, max(1_000, _MAX_DRAWS // examples))


def draw_resamples(examples: int, resamples: int) -> Iterator[Indices]:
    """Yield the example indices of the resamples in blocks, int64 (resamples of block, examples).

    The seed is fixed, so the same arguments give the same resamples.
    """
    rows = max(1, _DRAWS_AT_ONCE // examples)
    if resamples <= rows:
        yield _draw_all_resamples(examples, resamples, SEED)
        return
    random = np.random.default_rng(SEED)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        yield random.integers(0, examples, (count, examples), np.int32).astype(np.int64)


@lru_cache(maxsize=2)  # 16 MB each: suites and steps of as many examples draw the same
def _draw_all_resamples(examples: int, resamples: int, seed: int) -> Indices:
    """Return the example indices of all resamples, int64 (resamples, examples)."""
    drawn = np.random.default_rng(seed).integers(0, examples, (resamples, examples), np.int32)
    return drawn.astype(np.int64)  # what numpy looks up by, and would convert to at every use


def count_drawn(examples: int, resamples: int) -> Iterator[Counts]:
    """Yield how often each resample has each example, float32 (resamples of block, examples)."""
    if resamples * examples <= _DRAWS_AT_ONCE:
        yield _count_all_resamples(examples, resamples, SEED)
        return
    yield from map(_count_draws, draw_resamples(examples, resamples))


@lru_cache(maxsize=2)  # 8 MB each
def _count_all_resamples(examples: int, resamples: int, seed: int) -> Counts:
    """Return how often each resample has each example, float32 (resamples, examples)."""
    return _count_draws(_draw_all_resamples(examples, resamples, seed))


def _count_draws(drawn: Indices) -> Counts:
    """Convert the example indices of resamples into counts of each example, float32, same shape."""
    resamples, examples = drawn.shape
    cells = drawn + np.arange(resamples, dtype=np.int64)[:, None] * examples
    counts = np.bincount(cells.ravel(), minlength=resamples * examples)
    return counts.reshape(resamples, examples).astype(np.float32)


def _tail_probability(examples: int, confidence: float) -> float:
    """Return the share of resampled means beyond either end of the expanded percentile interval.

    examples: how many were resampled. confidence: the probability within the interval.
    """
    quantile = _expand_normal_quantile(examples - 1, confidence)
    return _NORMAL_DISTRIBUTION.cdf(-quantile * math.sqrt(examples / (examples - 1)))


def _expand_normal_quantile(degrees_of_freedom: int, confidence: float) -> float:
    """Approximate the two-sided quantile of Student's t from the normal quantile.

    confidence: the probability between the negative and the positive quantile. Within 0.001 from 4
        degrees of freedom on (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5).
    """
    z = _NORMAL_DISTRIBUTION.inv_cdf((1 + confidence) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return z + math.fsum(
        term / degrees_of_freedom**power for power, term in enumerate(terms, start=1)
    )


@lru_cache(maxsize=64)
def student_t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Return the quantile of Student's t for a probability above one half.

    By bisection of the distribution function, which is exact for whole degrees of freedom
    (Abramowitz and Stegun 26.7.3 and 26.7.4). Above 1,000 degrees the expansion 26.7.5 is used.
    """
    if degrees_of_freedom > _MAX_SUMMED_DEGREES:
        return _expand_normal_quantile(degrees_of_freedom, 2 * probability - 1)
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees_of_freedom) < probability:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if student_t_cdf(middle, degrees_of_freedom) < probability:
            low = middle
        else:
            high = middle
    return high


def student_t_cdf(value: float, degrees_of_freedom: int) -> float:
    """Return P(T <= value) of Student's t, for a value of at least 0 and whole degrees of freedom.

    Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    angle = math.atan(value / math.sqrt(degrees_of_freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees_of_freedom % 2 == 1
    term, total = (cosine, 0.0) if is_odd else (1.0, 1.0)
    for power in range(1 if is_odd else 2, degrees_of_freedom - 1, 2):
        if is_odd:
            total += term
            term *= cosine**2 * (power + 1) / (power + 2)
        else:
            term *= cosine**2 * (power - 1) / power
            total += term
    within = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return (1 + within) / 2
