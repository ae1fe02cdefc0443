"""The data set of a run: judged and tokenised once, and from the cache after that."""

from __future__ import annotations

from nested_core.config.schema import FineTuneConfig
from nested_core.data.cache import default_cache
from nested_core.data.dataset import load_dataset
from nested_core.data.rules.dataset_report import DatasetReport
from nested_core.data.settings import DataSettings
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.data.workers import OnProgress
from nested_core.models.lora import tokenizer_source


def load_run_data(
    config: FineTuneConfig, on_progress: OnProgress | None = None
) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
    """Report and tokens of the configured data set; see load_dataset for what it raises."""
    settings, tokenizer = DataSettings.from_config(config), tokenizer_source(config)
    return load_dataset(settings, tokenizer, on_progress, cache=default_cache())
