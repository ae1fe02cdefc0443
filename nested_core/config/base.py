"""What every part of the configuration is: immutable, and closed to keys that it does not know."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Without this `iters: true` would be 1."""
        values = value if isinstance(value, list | tuple) else (value,)
        if cls.model_fields[str(info.field_name)].annotation is not bool:
            for each in values:
                if isinstance(each, bool):
                    raise ValueError(f"true and false mean nothing here; found {each}")
        return value
