"""The bounds that the gate judges by. Nothing here lets an adapter past the gate."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic import NonNegativeFloat as Share

from nested_core.config.base import Section
from nested_core.config.rules import gate_problems, refuse


class GateSection(Section):
    """The bounds that the gate judges by; they are recorded in gate.json."""

    max_val_loss_increase: Share = 0.0
    min_relative_change: Share = 0.0
    max_skipped_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    general_data: str | None = None
    max_general_loss_increase: Share | None = None
    check_fused: bool = False

    @model_validator(mode="after")
    def _text_and_bound_together(self) -> Self:
        refuse(gate_problems(self))
        return self
