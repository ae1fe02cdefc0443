"""The keys about data: `hf_dataset` with mlx-lm's keys and defaults, and `data_policy`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from nested_core.config.base import Section

_GIVEN_BY_KEYS = {"path", "split"}


class HubDataset(Section):
    """One data set, which splits of it to read, and the columns that hold the fields."""

    path: Annotated[str, Field(min_length=1)]
    config: dict[str, Any] = Field(default_factory=dict)  # arguments of datasets.load_dataset
    train_split: str = "train[:80%]"
    valid_split: str = "train[-10%:]"
    test_split: str | None = None
    prompt_feature: str = "prompt"
    completion_feature: str = "completion"
    text_feature: str = "text"
    chat_feature: str = "messages"

    @model_validator(mode="before")
    @classmethod
    def _name_goes_into_config(cls, value: Any) -> Any:
        if isinstance(value, dict) and "name" in value:
            raise ValueError(
                "name is not read by mlx-lm either; a configuration of the data set is "
                f"chosen by config: {{name: {value['name']}}}"
            )
        return value

    @model_validator(mode="after")
    def _arguments_are_not_given_twice(self) -> Self:
        if twice := _GIVEN_BY_KEYS & self.config.keys():
            raise ValueError(f"config: {sorted(twice)} have keys of their own: path, train_split")
        return self


def _as_list(value: Any) -> Any:
    """As in mlx-lm a mapping is a list of one."""
    return [value] if isinstance(value, dict) else value


HubDatasets = Annotated[tuple[HubDataset, ...], BeforeValidator(_as_list)]


class DataPolicy(Section):
    """What happens to examples that are too long, repeated, or in a held-out set as well."""

    overlong: Literal["truncate", "drop", "error"] = "truncate"
    duplicates: Literal["keep", "drop"] = "keep"
    leakage: Literal["error", "drop"] = "error"
