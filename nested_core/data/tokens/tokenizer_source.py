"""The folder that a tokenizer is loaded from, so that another process can load the same one.

It is loaded as mlx_lm.load does, once a process; a model's own code runs only if the user trusts
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nested_core.models.base_model import find_model_folder, find_tokenizer_files
from nested_core.models.tokenizer_cell import TokenizerFiles, load_bounded_tokenizer

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from nested_core.config.schema import FineTuneConfig


@dataclass(frozen=True)
class TokenizerSource:
    """A model's local folder and whether its code is trusted; plain values to send to workers."""

    folder: str
    trust_remote_code: bool = False

    @classmethod
    def from_config(cls, config: FineTuneConfig) -> TokenizerSource:
        """Return the source of the configured model's tokenizer.

        Raises ConfigError without such a model.
        """
        return cls(str(find_model_folder(config.model)), config.trust_remote_code)

    @property
    def files(self) -> TokenizerFiles:
        """What is loaded; changed files are others."""
        return find_tokenizer_files(Path(self.folder), self.trust_remote_code)

    def load(self) -> TokenizerWrapper:
        """Load the tokenizer in mlx_lm's wrapper; ConfigError if the folder has none.

        It is loaded once a process, and again if its files have changed.
        """
        return load_bounded_tokenizer(self.files)
