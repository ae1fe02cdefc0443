"""`nested`: the tiers of parameters, and how often and how strongly each is updated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from nested_core.config.section import Section, key

Frequencies = Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=8)]


class Assignment(Section):
    """One rule of the manual strategy: names that match the pattern go to the tier."""

    match: str = key(..., "a regular expression over parameter names")
    tier: NonNegativeInt = key(..., "the tier that they go to; 0 is the fastest")

    def problems(self) -> Iterator[str]:
        """The pattern compiles."""
        try:
            re.compile(self.match)
        except re.error as error:
            yield f"{self.match!r} is not a regular expression: {error}"


class NestedSection(Section):
    """Tiers of parameters, each updated every so many optimizer steps."""

    frequencies: Frequencies = key((1,), "one a tier, ascending: updated every so many steps")
    strategy: Literal["layer_depth", "parameter_importance", "manual"] = key(
        "layer_depth", "what decides a parameter's tier"
    )
    fast: Literal["shallow", "deep"] = key("shallow", "end of the model updated at every step")
    slow_gradients: Literal["skip", "accumulate"] = key(
        "skip", "gradients of a tier that is not due: not computed, or gathered until it is due"
    )
    accumulate: Literal["mean", "sum"] = key("mean", "what becomes of gathered gradients")
    learning_rate_scale: tuple[NonNegativeFloat, ...] | None = key(
        None, "one factor a tier on the learning rate; null is 1 each"
    )
    weight_decay: tuple[NonNegativeFloat, ...] | None = key(
        None, "one weight decay a tier; null is the optimizer's"
    )
    assignments: tuple[Assignment, ...] = key((), "for the strategy manual; the first match wins")
    probe_batches: PositiveInt = key(8, "batches that parameter_importance measures gradients on")

    def problems(self) -> Iterator[str]:
        """Frequencies, numbers a tier and assignments agree."""
        tiers = len(self.frequencies)
        if list(self.frequencies) != sorted(self.frequencies):
            yield f"frequencies must ascend, fastest first; got {self.frequencies}"
        for name in ("learning_rate_scale", "weight_decay"):
            values = getattr(self, name)
            if values is not None and len(values) != tiers:
                yield f"{name} needs one number a tier ({tiers}), got {len(values)}"
        if (self.strategy == "manual") != bool(self.assignments):
            yield "strategy manual needs assignments, and only manual takes them"
        for assignment in self.assignments:
            if assignment.tier >= tiers:
                yield (
                    f"the assignment {assignment.match!r} names tier {assignment.tier}; "
                    f"{tiers} frequencies make tiers 0 to {tiers - 1}"
                )
