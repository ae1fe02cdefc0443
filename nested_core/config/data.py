"""The keys about data: `hf_dataset` with mlx-lm's keys and defaults, and `data_policy`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from nested_core.config.section import Section, key

LOAD_DATASET_ARGUMENTS_WITH_OWN_KEYS = {"path", "split"}  # arguments of datasets.load_dataset
NonEmpty = Annotated[str, Field(min_length=1)]


class HubDataset(Section):
    """One data set, which splits of it to read, and the columns that hold the fields."""

    path: NonEmpty = key(..., "the data set's name on the hub, or a folder", path="local_or_hub")
    config: dict[str, Any] = key({}, "keyword arguments of datasets.load_dataset")
    train_split: str = key("train[:80%]", "the split to train on")
    valid_split: str = key("train[-10%:]", "the split to validate on")
    test_split: str | None = key(None, "the split to test on")
    prompt_feature: str = key("prompt", "the column of the prompt")
    completion_feature: str = key("completion", "the column of the completion")
    text_feature: str = key("text", "the column of plain text")
    chat_feature: str = key("messages", "the column of the messages")

    @model_validator(mode="before")
    @classmethod
    def _refuse_name_outside_config(cls, value: Any) -> Any:
        if isinstance(value, dict) and "name" in value:
            raise ValueError(
                "name is not read by mlx-lm either; a configuration of the data set is "
                f"chosen by config: {{name: {value['name']}}}"
            )
        return value

    def problems(self) -> Iterator[str]:
        """No argument of load_dataset is given twice."""
        if twice := LOAD_DATASET_ARGUMENTS_WITH_OWN_KEYS & self.config.keys():
            yield f"config: {sorted(twice)} have keys of their own: path, train_split"


def _mapping_as_list(value: Any) -> Any:
    """As in mlx-lm a mapping is a list of one."""
    return [value] if isinstance(value, dict) else value


HubDatasets = Annotated[tuple[HubDataset, ...], BeforeValidator(_mapping_as_list)]


class DataPolicy(Section):
    """What happens to examples that are too long, repeated, or in a held-out set as well."""

    overlong: Literal["truncate", "drop", "error"] = key(
        "truncate", "examples above max_seq_length"
    )
    duplicates: Literal["keep", "drop"] = key("keep", "training examples that come twice")
    leakage: Literal["error", "drop"] = key("error", "training examples in a held-out set as well")
    near_duplicates: Literal["warn", "error", "off"] = key(
        "warn", "held-out examples that nearly are a training example"
    )
    roles: Literal["strict", "template"] = key(
        "strict", "roles and order of a chat: by our rules, or whatever the chat template takes"
    )
    group: NonEmpty | None = key(
        None, "a field of the rows, such as a document: held-out rows with one value count as one"
    )
