"""`gate`: the bounds that the gate judges by. Nothing here lets an adapter past the gate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from nested_core.config.section import Section, key

Share = Annotated[float, Field(ge=0, le=1)]


class GateSection(Section):
    """The bounds that the gate judges by; they are recorded in gate.json."""

    max_val_loss_increase: NonNegativeFloat = key(0.0, "relative, against the initial adapter")
    min_relative_change: NonNegativeFloat = key(0.0, "the least that a tensor must have moved")
    max_skipped_share: Share = key(0.01, "of a tier's updates, skipped for non-finite gradients")
    general_data: str | None = key(
        None, "JSON Lines of text that the adapter must not forget", path="local"
    )
    max_general_loss_increase: NonNegativeFloat | None = key(None, "relative, on general_data")
    check_fused: bool = key(False, "judge the adapter fused into the base model too")

    noise: Literal["paired", "none"] = key(
        "paired",
        "paired: a loss that rises beyond its bound counts where the 95 % interval of the paired "
        "differences leaves out 0; none: the bound alone",
    )

    def problems(self) -> Iterator[str]:
        """The general text and its bound come together."""
        if (self.general_data is None) != (self.max_general_loss_increase is None):
            yield "gate needs general_data and max_general_loss_increase, or neither"
