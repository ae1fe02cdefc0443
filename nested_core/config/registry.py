"""The configuration of what becomes of a verified adapter, and of what a run goes on from."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic import NonNegativeFloat as Share

from nested_core.config.adapter_names import NAME_PATTERN
from nested_core.config.base import Section
from nested_core.config.rules import refuse, registry_problems

AdapterName = Annotated[str, Field(pattern=f"^{NAME_PATTERN.pattern}$")]


class RegistrySection(Section):
    """Where verified adapters go, and which of them become champion by themselves.

    `better` asks for a loss on the same examples that is lower than the champion's by more than
    `min_improvement`; `approve` leaves it to a person.
    """

    path: str | None = None
    name: AdapterName | None = None
    promote: Literal["never", "always", "better", "approve"] = "never"
    min_improvement: Share = 0.0
    require_validation: bool = True

    @model_validator(mode="after")
    def _path_and_name_together(self) -> Self:
        refuse(registry_problems(self))
        return self


class ContinualSection(Section):
    """Whether a run goes on from the champion; `from` is the champion, or nothing.

    With `skip_unchanged`, a run on data and settings that the champion was trained with already
    ends before it begins.
    """

    start: Literal["champion"] | None = Field(default=None, alias="from")
    skip_unchanged: bool = True
