"""Examples that lost much while most did not: what a mean over all of them hides.

An example is harmed where its loss rose by more than a nat a token and by far more than differences
usually do; helped is the mirror image. Forgetting looks like that: a few answers are gone, the rest
stays, and the interval of the mean reaches far up while its lower end stays at 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nested_core.gate.example_losses import ExampleLosses
from nested_core.gate.paired_difference import independent_clusters

MIN_CHANGE = 1.0  # nats a token
MIN_SPREADS = 6 * 1.48  # median absolute deviations; 1.48 of them are a normal standard deviation
MIN_HARMED = 3
MIN_LOSS_OF_FEWEST = 4.0  # nats a token, on average: three harmed examples may be an exchange
MAX_CHANCE = 0.05  # that so many are harmed where the share is at its bound
MAX_CHANCE_OF_EXCHANGE = 0.01  # that so many more are harmed than helped where both are as likely


@dataclass(frozen=True)
class HarmedExamples:
    """How many independent examples were harmed and helped, of how many, and which lines.

    A cluster counts as harmed where more of its examples are harmed than helped. `mean_rise` is how
    much the harmed examples lost on average, in nats a token; 0 where none is harmed.
    """

    harmed: int
    helped: int
    examples: int
    mean_rise: float
    lines: tuple[int, ...] = ()

    @classmethod
    def find(cls, losses: ExampleLosses, margin: float = 0.0) -> HarmedExamples | None:
        """Among examples with losses before and after; None where one is not finite.

        `margin` is the rise of the mean loss that is allowed, in nats a token: what any example may
        rise by is no harm.
        """
        differences = losses.after - losses.before
        if not len(losses) or not np.isfinite(differences).all():
            return None
        deviation = np.abs(differences - np.median(differences))
        threshold = max(MIN_CHANGE, margin, MIN_SPREADS * float(np.median(deviation)))
        signs = (differences > threshold).astype(np.int64) - (differences < -threshold)
        clusters = independent_clusters(losses.clusters)
        balance = signs
        if clusters is not None:
            _, place = np.unique(clusters, return_inverse=True)
            balance = np.bincount(place, signs)
        order = np.argsort(-differences, kind="stable")[: int((signs > 0).sum())]
        return cls(
            harmed=int((balance > 0).sum()),
            helped=int((balance < 0).sum()),
            examples=len(balance),
            mean_rise=float(differences[order].mean()) if len(order) else 0.0,
            lines=tuple(int(line) for line in losses.lines[order]),
        )

    def is_beyond_chance(self, max_share: float) -> bool:
        """Whether so many are harmed that it is more than `max_share`, and more than an exchange.

        The exact one-sided 95 % lower bound of their share (Clopper and Pearson, 1934) is above
        `max_share` where so many or more come with a chance of less than 5 % at that share. Where
        some are helped, the sign test's mid-p of harmed against helped has to be at most 0.01.

        Where none is helped, three are enough only if they lost 4 nats a token on average. An
        adapter that harms as many examples as it helps shows three and none in up to 5 % of cases,
        four and none in 2 % (docs/noise.md).
        """
        if self.harmed < MIN_HARMED:
            return False
        if binomial_upper_tail(self.harmed, self.examples, max_share) >= MAX_CHANCE:
            return False
        if self.helped:
            return exchange_mid_p(self.harmed, self.helped) <= MAX_CHANCE_OF_EXCHANGE
        return self.harmed > MIN_HARMED or self.mean_rise >= MIN_LOSS_OF_FEWEST


def exchange_mid_p(lost: int, won: int) -> float:
    """The one-sided mid-p of so many lost and won where both are as likely (McNemar's test).

    P(X > lost) + P(X = lost) / 2 for X of lost + won fair coins (Fagerland, Lydersen and Laake, BMC
    Medical Research Methodology 13:91, 2013).
    """
    changed = lost + won
    more = binomial_upper_tail(lost + 1, changed, 0.5)
    return (more + binomial_upper_tail(lost, changed, 0.5)) / 2


def binomial_upper_tail(successes: int, trials: int, chance: float) -> float:
    """P(X >= successes) of a binomial distribution."""
    if successes <= 0 or chance >= 1:
        return 1.0
    if chance <= 0:
        return 0.0
    return math.fsum(
        math.exp(
            math.lgamma(trials + 1)
            - math.lgamma(k + 1)
            - math.lgamma(trials - k + 1)
            + k * math.log(chance)
            + (trials - k) * math.log1p(-chance)
        )
        for k in range(successes, trials + 1)
    )


def describe_harmed(found: HarmedExamples, file: str, max_lines: int = 3) -> str:
    """`3 of 30 examples lost more than a nat a token and 0 won as much: valid.jsonl:4, 9, 17`."""
    listed = ", ".join(str(line) for line in found.lines[:max_lines])
    more = ", ..." if len(found.lines) > max_lines else ""
    return (
        f"{found.harmed} of {found.examples} examples lost far more than a nat a token, and "
        f"{found.helped} won as much: {file}:{listed}{more}"
    )
