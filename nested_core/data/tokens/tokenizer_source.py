"""The folder that a tokenizer is loaded from, so that another process can load the same one.

It is loaded as mlx_lm.load does, once a process; a model's own code runs only if the user trusts
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from nested_core.errors import ConfigError, shorten
from nested_core.models.base_model import find_model_folder, fingerprint_tokenizer

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from nested_core.config.schema import FineTuneConfig


# Keys of tokenizer_config.json that name a module of mlx-lm, by its package.
TOKENIZER_CONFIG_KEY_BY_PACKAGE = {
    "chat_templates": "chat_template_type",
    "tool_parsers": "tool_parser_type",
}


# As transformers' tokenization_utils_base.py names what it has warned of.
TOO_LONG_WARNING = "sequence-length-is-longer-than-the-specified-maximum"


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

    def load(self) -> TokenizerWrapper:
        """Load the tokenizer in mlx_lm's wrapper; ConfigError if the folder has none.

        It is loaded once a process, and again if its files have changed.
        """
        return _load_tokenizer(self, fingerprint_tokenizer(Path(self.folder)))


@lru_cache(maxsize=2)
def _load_tokenizer(source: TokenizerSource, fingerprint: str) -> TokenizerWrapper:  # noqa: ARG001  # a key
    """Load a tokenizer; ConfigError if it cannot be loaded.

    fingerprint: the hash of its files, so that changed files are loaded again.
    """
    from mlx_lm.utils import load_config, load_tokenizer

    folder = Path(source.folder)
    try:
        ends = load_config(folder).get("eos_token_id")
        extra = {"trust_remote_code": source.trust_remote_code}
        tokenizer: TokenizerWrapper = load_tokenizer(folder, extra, eos_token_ids=ends)
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises Exception itself, malformed JSON anything
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("mlx_lm."):
            package, _, name = str(error.name).removeprefix("mlx_lm.").partition(".")
            key = TOKENIZER_CONFIG_KEY_BY_PACKAGE.get(package, package)
            reason = f"its {key} {shorten(name)!r} is not one that this mlx-lm has"
        if other := _describe_other_folder(folder):
            raise ConfigError(f"model: {folder} is {other}") from error
        raise ConfigError(
            f"model: no tokenizer could be loaded from {folder} ({reason}). Expected the model's "
            f"config.json, tokenizer.json and tokenizer_config.json there."
        ) from error
    # transformers would warn of a text beyond the model's context, which the data's report counts
    tokenizer.deprecation_warnings[TOO_LONG_WARNING] = True
    return tokenizer


def _describe_other_folder(folder: Path) -> str | None:
    """Describe what is in the place of a model, and what to give instead; None if unknown."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return (
            "an adapter, not a model. Give its base as model; to continue from the adapter itself, "
            "name its adapters.safetensors as resume_adapter_file."
        )
    return None
