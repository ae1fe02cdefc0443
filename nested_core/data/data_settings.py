"""The part of a configuration that decides which data is read and how."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import DataFormat, DataPolicy, HubDataset
from nested_core.data.lines.example_parsing import FieldNames
from nested_core.errors import join_first_values
from nested_core.text.foreign_text import escape

SPLITS = ("train", "valid", "test")
REPLAY_SPLIT = "replay"  # earlier examples that a run mixes in: no split of its data set
MAX_SHOWN_FILE_NAMES = 5  # of a folder without train or valid


# What the loss counts of an example: all of it, the last turn, or every turn of the assistant.
Targets = Literal["whole", "last", "all"]


@dataclass(frozen=True)
class DataSettings:
    """The keys of a configuration that affect data, with their names and defaults."""

    data: str
    batch_size: int = 4
    max_seq_length: int = 2048
    mask_prompt: bool = False
    supervise: Literal["last", "all"] = "last"
    prompt_feature: str = "prompt"
    completion_feature: str = "completion"
    text_feature: str = "text"
    chat_feature: str = "messages"
    data_format: DataFormat = "auto"
    drop_fields: tuple[str, ...] = ()
    hf_dataset: tuple[HubDataset, ...] = ()
    trust_remote_code: bool = False
    policy: DataPolicy = DataPolicy()
    loss: str | None = None
    held_out_before: tuple[str, ...] = ()  # SHA-256 of examples of train to drop: `ReplayRecord`

    @classmethod
    def from_config(cls, config: FineTuneConfig) -> DataSettings:
        """Extract the settings from a configuration."""
        names = {setting.name for setting in fields(cls)} & FineTuneConfig.model_fields.keys()
        return cls(
            supervise=config.training.supervise,
            policy=config.data_policy,
            loss=config.training.loss,
            **{name: getattr(config, name) for name in names},
        )

    @property
    def supervised_targets(self) -> Targets:
        """Which tokens of an example the loss counts: whole, last turn, or all assistant turns."""
        if self.supervise == "all":
            return "all"
        return "last" if self.mask_prompt else "whole"

    @property
    def field_names(self) -> FieldNames:
        """The JSON keys to read; hub data sets have theirs renamed to the default ones."""
        names = FieldNames(
            allows_any_role=self.policy.roles == "template",
            group=self.policy.group,
            data_format=self.data_format,
            drop=self.drop_fields,
            loss=self.loss,
        )
        if self.hf_dataset:
            return names
        return replace(
            names,
            prompt=self.prompt_feature,
            completion=self.completion_feature,
            text=self.text_feature,
            chat=self.chat_feature,
        )

    @property
    def json_keys(self) -> frozenset[str]:
        """The columns of a table of texts whose cells contain JSON."""
        return frozenset({self.chat_feature, "tools"}.difference(self.drop_fields))

    @property
    def column_flags(self) -> str:
        """The flags of `init` that name a table's columns, with a leading space.

        They are "" if the columns have the default names.
        """
        names = (self.prompt_feature, self.completion_feature)
        if names == ("prompt", "completion"):
            return ""
        return " --prompt-feature {} --completion-feature {}".format(*map(shlex.quote, names))

    @property
    def describe_source(self) -> str:
        """Where the data comes from, for messages."""
        return ", ".join(entry.path for entry in self.hf_dataset) or self.data

    def describe_incomplete_folder(self, splits: Collection[str]) -> tuple[str, str]:
        """Describe, for the report, where data without train or valid is and what is there instead.

        splits: the splits that exist.

        Returns the path of the folder and the first names in it, or the name of a file or hub data
        set. Both are "" if train and valid exist.
        """
        if {"train", "valid"} <= set(splits):
            return "", ""
        folder = Path(self.data)
        if self.hf_dataset or not folder.is_dir():
            is_file = folder.is_file() or not {*"*?["}.isdisjoint(self.data)
            content = "train alone" if is_file and not self.hf_dataset else "no split of that name"
            return shlex.quote(self.describe_source), content
        names = sorted(escape(path.name) for path in folder.iterdir())
        content = join_first_values(names, MAX_SHOWN_FILE_NAMES) or "nothing"
        return escape(str(folder.absolute())), content
