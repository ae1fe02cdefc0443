"""Decide which of several comparisons show more than chance (multiple testing).

Of 20 models that answer as well as a reference, one in two would look better or worse at 2.5 % a
comparison. The comparisons therefore share one error rate for each direction (family-wise).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nested_core.records.paired_difference import student_t_cdf

ALPHA = 0.025  # one-sided, of all comparisons of a family together


@dataclass(frozen=True)
class Chance:
    """The one-sided p-value of a comparison.

    p_value: the probability of a change at least as large as the one seen if nothing had changed.
    smallest: the smallest p-value that the comparison could have had: the one if everything that
        changed had changed in this direction. 0 if that is not known.
    """

    p_value: float
    smallest: float = 0.0


NOT_TESTED = Chance(1.0, 1.0)


def find_beyond_chance(family: Sequence[Chance]) -> list[bool]:
    """Return, for each comparison, whether it shows a change at a family-wise error rate of ALPHA.

    Holm's procedure (Scandinavian Journal of Statistics 6, 1979) with Tarone's correction
    (Biometrics 46, 1990): a comparison whose smallest possible p-value is too large to show
    anything is not counted, so it costs the others nothing.
    """
    remaining = sorted(range(len(family)), key=lambda index: family[index].p_value)
    is_shown = [False] * len(family)
    while remaining:
        # Tarone's divisor of ALPHA: the least k such that at most k p-values can reach ALPHA / k
        smallest = [family[index].smallest for index in remaining]
        divisor = next(
            k
            for k in range(1, len(smallest) + 1)
            if sum(p_value <= ALPHA / k for p_value in smallest) <= k
        )
        if family[remaining[0]].p_value > ALPHA / divisor:
            break
        is_shown[remaining.pop(0)] = True
    return is_shown


def chance_of_mean(mean: float, standard_error: float, examples: int) -> float:
    """Return the one-sided p-value of a mean above 0, by Student's t.

    examples: how many independent values the mean is of.
    """
    if standard_error == 0:
        return 0.0
    return 1 - student_t_cdf(mean / standard_error, examples - 1)
