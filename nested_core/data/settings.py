"""The part of a configuration that decides what is read and how."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from nested_core.data.fields import Features


@dataclass(frozen=True)
class DataSettings:
    """The data-relevant keys of a configuration, with mlx-lm's names and defaults."""

    data: str
    batch_size: int = 4
    max_seq_length: int = 2048
    mask_prompt: bool = False
    prompt_feature: str = "prompt"
    completion_feature: str = "completion"
    text_feature: str = "text"
    chat_feature: str = "messages"

    @classmethod
    def from_config(cls, config: Any) -> DataSettings:
        """Take the attributes of the same names from a larger configuration."""
        return cls(**{setting.name: getattr(config, setting.name) for setting in fields(cls)})

    @property
    def features(self) -> Features:
        """The JSON keys to read."""
        return Features(
            self.prompt_feature, self.completion_feature, self.text_feature, self.chat_feature
        )

    @property
    def json_keys(self) -> frozenset[str]:
        """The columns of a table of texts whose cells hold JSON."""
        return frozenset({self.chat_feature, "tools"})
