"""The configuration of the low-rank matrices, in mlx-lm's words or with PEFT's alpha."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from nested_core.config.section import Section, key, lay_out_form

DEFAULT_RANK = 8
Dropout = Annotated[float, Field(ge=0, lt=1)]
Modules = Annotated[tuple[str, ...], Field(min_length=1)]


def _add_alpha_to_schema(schema: dict[str, Any]) -> None:
    """Forms that are made from the schema (Prefect's) take alpha too."""
    described = "scale times rank, as PEFT has it; in place of scale"
    schema["properties"]["alpha"] = {"title": "Alpha", "type": "number", "description": described}
    lay_out_form(schema)


class LoraParameters(Section):
    """The low-rank matrices: their rank, the factor on their product, where they go (`keys`).

    `alpha` may be given in place of `scale`, and is kept as the scale that it means: alpha / rank
    (peft/tuners/lora/layer.py). The attribute is not called `keys`, or dict() would take the
    section for a mapping.
    """

    model_config = ConfigDict(json_schema_extra=_add_alpha_to_schema)

    rank: PositiveInt = key(DEFAULT_RANK, "inner dimension of the two factors")
    dropout: Dropout = key(0.0, "share of the inputs left out in training")
    scale: PositiveFloat = key(
        20.0, "factor on the product of the two matrices; or give alpha, which is scale times rank"
    )
    modules: Modules | None = key(
        None, "names of the modules that get an adapter; null: all linear ones", alias="keys"
    )

    @model_validator(mode="before")
    @classmethod
    def _convert_alpha(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "alpha" not in values:
            return values
        others = {key: value for key, value in values.items() if key != "alpha"}
        alpha, rank = values["alpha"], others.get("rank", DEFAULT_RANK)
        if alpha is None:
            return others
        if others.get("scale") is not None:
            raise ValueError(
                f"alpha and scale say the same thing (scale = alpha / rank); found alpha {alpha!r} "
                f"and scale {others['scale']!r}: give one of them"
            )
        if not _is_number(alpha) or not 0 < alpha <= sys.float_info.max:
            raise ValueError(f"alpha should be a finite number above 0; found {alpha!r:.80}")
        if not _is_number(rank) or not rank >= 1:
            raise ValueError(f"rank should be a whole number above 0; found {rank!r:.80}")
        return others | {"scale": alpha / rank}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
