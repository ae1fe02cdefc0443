"""How often the gate's 95 % intervals hold the truth, and how often lost answers are seen.

`python -m benchmarks.paired_intervals` prints both tables of docs/noise.md, in a few minutes. The
rivals are Student's t and the other bootstrap intervals, from scipy where it has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from nested_core.gate.paired_difference import compare_pairs

Vector = np.ndarray[Any, np.dtype[np.float64]]
Draw = Callable[[np.random.Generator, int], Vector]
Interval = tuple[float, float]

TRIALS = {5: 1_500, 12: 1_500, 30: 1_000, 84: 800, 200: 500, 2_000: 200}
RESAMPLES = 1_000
QUESTIONS = 200
SUITES = 20_000
# Chances that an answer is lost and won.
EXCHANGES = [(0.125, 0.025), (0.01, 0.01), (0.025, 0.025), (0.05, 0.05), (0.1, 0.1)]
FIVE_POINTS = [(0.05, 0.0), (0.06, 0.01), (0.075, 0.025), (0.1, 0.05), (0.15, 0.1), (0.25, 0.2)]


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


def print_power() -> None:
    """How often a drop is seen on 200 questions whose answers are lost and won at random."""
    random = np.random.default_rng(0)
    decided: dict[tuple[int, int], tuple[bool, bool]] = {}
    print("| lost | won | the interval leaves out 0 | exact McNemar |")
    for lost_chance, won_chance in [*EXCHANGES, *FIVE_POINTS]:
        rest = 1 - lost_chance - won_chance
        counts = random.multinomial(QUESTIONS, (lost_chance, won_chance, rest), SUITES)
        seen = np.array([_decide(int(lost), int(won), decided) for lost, won, _ in counts])
        interval, exact = seen.mean(axis=0)
        print(f"| {lost_chance:.1%} | {won_chance:.1%} | {interval:.1%} | {exact:.1%} |")


def _decide(lost: int, won: int, decided: dict[tuple[int, int], tuple[bool, bool]]) -> Any:
    if (lost, won) not in decided:
        after = np.repeat([-1.0, 1.0, 0.0], (lost, won, QUESTIONS - lost - won))
        is_below = compare_pairs(np.zeros(QUESTIONS), after).is_below(0)
        chance = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
        decided[lost, won] = is_below, bool(chance < 0.05 and lost > won)
    return decided[lost, won]


if __name__ == "__main__":
    print_power()
    print_coverage()
