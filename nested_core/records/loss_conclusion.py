"""What a paired difference of losses shows: better, no worse, worse, or nothing sure.

"No worse" is a claim that has to be shown: the rise that the examples leave possible must lie
within a margin (a test of non-inferiority; Schuirmann, Journal of Pharmacokinetics and
Biopharmaceutics 15, 1987). What is neither shown to be worse nor no worse is inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from nested_core.text.loss_format import format_interval

Conclusion = Literal["better", "no_worse", "inconclusive", "worse"]

MIN_EXAMPLES = 5  # independent ones; fewer have no interval: nothing can be shown, nor promoted
TOO_FEW_TO_TELL = f"fewer than {MIN_EXAMPLES} independent examples are too few to tell"
MIN_MARGIN = 0.01  # nats: a loss near 0 has a margin too
MIN_CHANGE = 1.0  # in the unit of the loss: of an example that counts as harmed or helped
MAX_RISE_OF_FEW = 0.1  # of the loss before, where there are too few examples for an interval
MAX_NAMED_EXAMPLES = 100_000
_Z_ONE_SIDED = 1.6449  # the 95 % end of one side
_Z_TWO_SIDED = 1.96  # the 95 % interval
_Z_POWER = 0.8416  # 80 % of the time
POWER_FACTOR = (_Z_TWO_SIDED + _Z_POWER) / _Z_TWO_SIDED  # 80 % power in place of a half: 1.43


def margin_of_loss(increase: float, loss_before: float, noise: Literal["paired", "none"]) -> float:
    """Return the rise of a loss that a relative bound allows; at least MIN_MARGIN.

    increase: the bound as a share of `loss_before`; 0.0 allows no rise.
    noise: with `none`, the bound holds as it is, without the minimum.
    """
    margin = increase * loss_before
    return margin if increase == 0 or noise == "none" else max(margin, MIN_MARGIN)


def conclude(
    difference: float,
    interval: Sequence[float] | None,
    one_sided_high: float | None,
    *,
    margin: float,
    loss_before: float,
    noise: Literal["paired", "none"],
) -> Conclusion:
    """Classify a mean paired loss difference as better, no_worse, inconclusive or worse.

    Args:
        difference: the mean of the paired differences, after minus before.
        interval: its 95 % interval; None with too few examples for one.
        one_sided_high: the upper end of its one-sided 95 % interval.
        margin: the rise that is allowed, from `margin_of_loss`.
        loss_before: the mean loss that the difference is measured from.
        noise: `paired` decides by the intervals, `none` by the mean alone.

    With an interval: better if all of it is below 0, no_worse if the rise is surely within the
    margin, worse if all of it is above 0. Without one, which is with few examples: only a large
    rise is worse (any rise if the margin is 0), all else is inconclusive.
    """
    if noise == "none":
        if difference < 0:
            return "better"
        return "no_worse" if difference <= margin else "worse"
    if interval is None or one_sided_high is None:
        allowed = max(margin, MAX_RISE_OF_FEW * loss_before) if margin > 0 else 0.0
        return "worse" if difference > allowed else "inconclusive"
    if interval[1] < 0:
        return "better"
    if one_sided_high <= margin:
        return "no_worse"
    return "worse" if interval[0] > 0 else "inconclusive"


def count_examples_needed(
    difference: float, standard_error: float, examples: int, margin: float
) -> int | None:
    """Estimate how many independent examples would settle an inconclusive comparison of losses.

    The estimate is the sample size, at 80 % power, that shows an adapter with no true difference to
    be no worse than the margin. If there are that many already, it is the sample size that
    distinguishes the difference that was seen from 0 or from the margin.

    difference, standard_error: mean and standard error of the paired differences.
    examples: how many independent examples the standard error comes from.
    margin: the allowed rise.

    Returns the number rounded up to 2 significant digits; None if it exceeds MAX_NAMED_EXAMPLES or
    the standard error is 0 or not finite.
    """
    deviation = standard_error * math.sqrt(examples)
    if not math.isfinite(deviation) or deviation == 0:
        return None
    # A one-sided test that a difference of 0 is within the margin
    needed = ((_Z_ONE_SIDED + _Z_POWER) * deviation / margin) ** 2 if margin > 0 else 0.0
    if needed <= examples:
        # A two-sided test against 0 or the margin, whichever is farther away
        distance = max(abs(difference), margin - difference)
        needed = ((_Z_TWO_SIDED + _Z_POWER) * deviation / distance) ** 2 if distance else math.inf
    if needed > MAX_NAMED_EXAMPLES:
        return None
    # Two significant digits
    unit = int(10 ** max(0, math.floor(math.log10(needed)) - 1))
    return math.ceil(needed / unit) * unit


def describe_smallest_visible(difference: float, unit: str) -> str:
    """Describe the smallest change that the examples reliably detect, with 80 % power.

    difference: the change, in `unit`, that is detected in half of all comparisons.
    """
    return f"reliably detect changes of {POWER_FACTOR * difference:.2g} {unit} or more (80 % power)"


def describe_inconclusive(
    difference: float,
    interval: Sequence[float] | None,
    margin: float | None,
    examples_needed: int | None,
    unit: str,
) -> str:
    """Describe an inconclusive comparison of losses and how many examples would settle it.

    difference, interval: the mean difference and its 95 % interval, if there is one.
    margin: the allowed rise; None if no bound is set.
    examples_needed: from `count_examples_needed`; None if too many.
    Example: `inconclusive: +0.03 nats/token (95 % interval -0.05 to +0.11, allowed rise 0.02); some
        400 examples would settle it`.
    """
    figures = []
    if interval is not None:
        figures.append(f"95 % interval {format_interval(interval, 2)}")
    if margin is not None:
        figures.append(f"allowed rise {margin:.2g}")
    seen = f" ({', '.join(figures)})" if figures else ""
    text = f"inconclusive: {difference:+.2g} {unit}{seen}"
    if interval is None:
        return f"{text}; {TOO_FEW_TO_TELL}"
    if examples_needed is not None:
        return f"{text}; some {examples_needed:,} examples would settle it"
    return f"{text}; more than {MAX_NAMED_EXAMPLES:,} examples would be needed to settle it"
