"""The mean difference of paired values, and whether it is more than chance.

Two adapters are compared on the same examples: the difference is taken example by example, so that
what makes an example hard for both cancels. Its 95 % interval is a bootstrap over examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

CONFIDENCE = 0.95
MIN_EXAMPLES = 5  # with fewer the interval is all numbers: nothing can be shown
RESAMPLES = 10_000
SEED = 20_251_121
_MAX_DRAWS = 100_000_000  # in all: a very large set is resampled less often
_DRAWS_AT_ONCE = 2_000_000  # 16 MB of indices
_NORMAL_DISTRIBUTION = NormalDist()
Vector = np.ndarray[Any, np.dtype[np.float64]]
Values = Sequence[float] | Vector


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference over paired examples: below 0 where the second value is the smaller.

    examples: how many pairs there are.
    mean: the weighted mean of second minus first, in the unit of the values.
    standard_error: of that mean, from the spread of the differences.
    low, high: the ends of its 95 % interval; infinite with fewer than MIN_EXAMPLES.
    """

    examples: int
    mean: float
    standard_error: float
    low: float
    high: float

    @property
    def is_measurable(self) -> bool:
        """Whether there are enough examples for an interval."""
        return self.examples >= MIN_EXAMPLES

    @property
    def smallest_visible(self) -> float:
        """The smallest mean difference that these examples could have told from none."""
        return (self.high - self.low) / 2

    def is_above(self, bound: float) -> bool:
        """Whether the difference is greater than `bound`, beyond chance."""
        return self.low > bound

    def is_below(self, bound: float) -> bool:
        """Whether the difference is less than `bound`, beyond chance."""
        return self.high < bound

    def to_json(self) -> dict[str, Any]:
        """`difference`, `standard_error` and `interval`, which is null if there is none."""
        interval = [self.low, self.high] if self.is_measurable else None
        error = self.standard_error if self.is_measurable else None
        return {"difference": self.mean, "standard_error": error, "interval": interval}


def compare_pairs(first: Values, second: Values, weights: Values | None = None) -> PairedDifference:
    """Compare two values of each example: losses before and after, or scores of two adapters.

    The mean is sum(w * (second - first)) / sum(w). With each example's mean loss as the value and
    its supervised tokens as the weight it is the difference of two mean losses a token; an example
    is drawn together with its weight. Without weights all examples count alike.

    The interval is the expanded percentile interval of the bootstrap (Hesterberg, "What teachers
    should know about the bootstrap", The American Statistician 69, 2015, section 3.2): the plain
    one is too narrow by what Student's t adds to a normal distribution, and by sqrt((n - 1) / n).
    docs/noise.md has its measured coverage beside four others'.

    Raises ValueError for no examples, vectors of unequal lengths, values that are not finite, and
    weights that are not above 0.
    """
    counts = np.ones(len(first)) if weights is None else np.asarray(weights, np.float64)
    examples = counts.size
    if not len(first) == len(second) == examples > 0:
        raise ValueError(f"expected as many of each: {len(first)}, {len(second)} and {examples}")
    pair = np.array([first, second], np.float64)
    if not np.isfinite(pair).all() or not (np.isfinite(counts) & (counts > 0)).all():
        raise ValueError("values must be finite, and weights finite and above 0")
    values = pair[1] - pair[0]
    mean = float(counts @ values / counts.sum())
    if examples < MIN_EXAMPLES:
        return PairedDifference(examples, mean, math.inf, -math.inf, math.inf)
    residuals = counts * (values - mean)
    variance = float(residuals @ residuals) * examples / (examples - 1)
    means = _resampled_means(values, None if weights is None else counts)
    low, high = np.quantile(means, (_tail_probability(examples), 1 - _tail_probability(examples)))
    error = math.sqrt(variance) / float(counts.sum())
    return PairedDifference(examples, mean, error, float(low), float(high))


def smallest_visible_share(examples: int) -> float:
    """The smallest share of 0-or-1 scores whose loss, with none won, shows beyond chance.

    1.0 at most, which says that no loss can show. A resample misses all k lost scores with a chance
    of (1 - k / n) ** n, which has to be less than the interval's tail.
    """
    if examples < MIN_EXAMPLES:
        return 1.0
    lost = math.ceil(examples * (1 - math.pow(_tail_probability(examples), 1 / examples)))
    return lost / examples


def _resampled_means(values: Vector, weights: Vector | None) -> Vector:
    """The weighted mean of as many examples drawn with replacement, many times; seeded."""
    examples = values.size
    resamples = min(RESAMPLES, max(1_000, _MAX_DRAWS // examples))
    random = np.random.default_rng(SEED)
    rows = max(1, _DRAWS_AT_ONCE // examples)
    sums = values if weights is None else values * weights
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        end = min(start + rows, resamples)
        drawn = random.integers(0, examples, (end - start, examples), np.int32)
        total = examples if weights is None else weights[drawn].sum(axis=1)
        means[start:end] = sums[drawn].sum(axis=1) / total
    return means


def _tail_probability(examples: int) -> float:
    """The share of resampled means that lies beyond either end of the expanded interval."""
    quantile = _student_t_quantile(examples - 1)
    return _NORMAL_DISTRIBUTION.cdf(-quantile * math.sqrt(examples / (examples - 1)))


def _student_t_quantile(degrees_of_freedom: int) -> float:
    """The upper quantile of Student's t at CONFIDENCE, both sides; within 0.001 from 4 degrees.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = _NORMAL_DISTRIBUTION.inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return z + math.fsum(
        term / degrees_of_freedom**power for power, term in enumerate(terms, start=1)
    )
