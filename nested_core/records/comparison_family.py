"""Several comparisons that are looked at together, and which of them show more than chance.

Of 20 models that answer as well as a reference, one in two would look better or worse at 2.5 % a
comparison. The comparisons are one family, with one error rate for each direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nested_core.records.paired_difference import student_t_cdf

ALPHA = 0.025  # one-sided, of all comparisons of a family together


@dataclass(frozen=True)
class Chance:
    """How likely a change as large as the one seen is where nothing changed, one-sided.

    smallest: what `p_value` would be if everything that changed had changed in this direction; 0
        where that is not known.
    """

    p_value: float
    smallest: float = 0.0


NOT_TESTED = Chance(1.0, 1.0)


def find_beyond_chance(family: Sequence[Chance]) -> list[bool]:
    """Whether each comparison shows a change, at an error rate of ALPHA for the whole family.

    Holm's procedure (Scandinavian Journal of Statistics 6, 1979). A comparison of so few changes
    that it could not show anything is not counted (Tarone, Biometrics 46, 1990): eval sets that
    hardly change cost the others nothing.
    """
    remaining = sorted(range(len(family)), key=lambda index: family[index].p_value)
    is_shown = [False] * len(family)
    while remaining:
        divisor = _count_comparisons([family[index].smallest for index in remaining])
        if family[remaining[0]].p_value > ALPHA / divisor:
            break
        is_shown[remaining.pop(0)] = True
    return is_shown


def _count_comparisons(smallest: Sequence[float]) -> int:
    """By how many the chance is divided: the least k such that at most k can reach ALPHA / k."""
    return next(
        count
        for count in range(1, len(smallest) + 1)
        if sum(least <= ALPHA / count for least in smallest) <= count
    )


def chance_of_mean(mean: float, standard_error: float, examples: int) -> float:
    """The chance of a mean so far above 0, by Student's t; `mean` is above 0."""
    if standard_error == 0:
        return 0.0
    return 1 - student_t_cdf(mean / standard_error, examples - 1)
