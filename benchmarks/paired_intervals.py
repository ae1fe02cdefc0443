"""How often the gate's 95 % intervals hold the truth.

`python -m benchmarks.paired_intervals` prints what benchmarks/gate.md has of it, and more, in a few
minutes. The rivals are Student's t and the other bootstrap intervals, from scipy where it has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from nested_core.records.paired_difference import compare_pairs

Vector = np.ndarray[Any, np.dtype[np.float64]]
Draw = Callable[[np.random.Generator, int], Vector]
Interval = tuple[float, float]

TRIALS = {5: 1_500, 12: 1_500, 30: 1_000, 84: 800, 200: 500, 2_000: 200}
RESAMPLES = 1_000


def few_fall_far(random: np.random.Generator, examples: int) -> Vector:
    """Losses of which a fifth fall by 3 on average, and the others hardly move."""
    falls = -random.exponential(3, examples)
    return np.where(random.random(examples) < 0.2, falls, random.normal(0, 0.1, examples))


# Distributions of an example's difference, and their means.
DIFFERENCES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda random, examples: random.normal(0, 1, examples), 0.0),
    "Student's t, 3 degrees": (lambda random, examples: random.standard_t(3, examples), 0.0),
    "exponential": (lambda random, examples: -random.exponential(1, examples), -1.0),
    "log-normal": (lambda random, examples: random.lognormal(0, 1, examples), float(np.exp(0.5))),
    "a fifth falls far": (few_fall_far, -0.6),
}


def ours(differences: Vector) -> Interval:
    """The gate's interval."""
    found = compare_pairs(np.zeros_like(differences), differences)
    return found.low, found.high


def student_t(differences: Vector) -> Interval:
    """Student's t."""
    mean, error = differences.mean(), stats.sem(differences)
    low, high = stats.t.interval(0.95, len(differences) - 1, mean, error)
    return float(low), float(high)


def scipy_bootstrap(method: str) -> Callable[[Vector], Interval]:
    """One of scipy's bootstrap intervals."""

    def interval(differences: Vector) -> Interval:
        found = stats.bootstrap(
            (differences,), np.mean, n_resamples=RESAMPLES, method=method
        ).confidence_interval
        return float(found.low), float(found.high)

    return interval


def studentised(differences: Vector) -> Interval:
    """The bootstrap of (mean - true mean) / standard error."""
    examples = len(differences)
    drawn = differences[np.random.default_rng(0).integers(0, examples, (RESAMPLES, examples))]
    errors = drawn.std(axis=1, ddof=1) / np.sqrt(examples)
    mean, error = differences.mean(), stats.sem(differences)
    ratios = (drawn.mean(axis=1)[errors > 0] - mean) / errors[errors > 0]
    high, low = np.quantile(ratios, (0.025, 0.975))
    return float(mean - low * error), float(mean - high * error)


METHODS: dict[str, Callable[[Vector], Interval]] = {
    "expanded percentile (ours)": ours,
    "percentile": scipy_bootstrap("percentile"),
    "BCa": scipy_bootstrap("BCa"),
    "studentised": studentised,
    "Student's t": student_t,
}


def print_coverage() -> None:
    """A row a distribution and number of examples, a column a method: per cent that hold."""
    print("| differences | examples | " + " | ".join(METHODS) + " |")
    for name, (draw, mean) in DIFFERENCES.items():
        for examples, trials in TRIALS.items():
            random = np.random.default_rng(examples)
            samples = [draw(random, examples) for _ in range(trials)]
            cells = []
            for method in METHODS.values():
                intervals = [method(sample) for sample in samples]
                share = sum(low <= mean <= high for low, high in intervals) / trials
                width = np.median([high - low for low, high in intervals])
                cells.append(f"{share:.1%} ({width:.2f})")
            print(f"| {name} | {examples} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    print_coverage()
