"""A data set with train, valid and test: a report on all of it, and the tokens of what is sound.

Both come from the cache if nothing has changed since they were made. Refuses nothing by itself: the
caller asks the report with `raise_if_rejected`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from nested_core.config.schema import FineTuneConfig
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_cache import (
    DatasetCache,
    open_user_dataset_cache,
    write_report_beside_tokens,
)
from nested_core.data.parallel_jobs import OnProgress
from nested_core.data.rules.dataset_report import DatasetReport
from nested_core.data.sources.split_files import SplitFile, open_splits
from nested_core.data.tokens.tokenized_split import TokenizedSplit, write_manifest_and_open_tokens
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import DatasetError


def load_run_data(
    config: FineTuneConfig, on_progress: OnProgress | None = None
) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
    """`load_dataset` for the configured data set, with the user's cache."""
    settings = DataSettings.from_config(config)
    tokenizer = TokenizerSource.from_config(config)
    return load_dataset(settings, tokenizer, on_progress, cache=open_user_dataset_cache())


def load_dataset(
    settings: DataSettings,
    tokenizer: TokenizerSource | None,
    on_progress: OnProgress | None = None,
    *,
    cache: DatasetCache | None = None,
) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
    """Read, judge and (with a tokenizer) tokenise a data set, or take both from the cache.

    The splits returned hold each sound line of each split that exists, in the order of the file,
    without those that data_policy drops. They are mapped from the cache, or from files that go when
    the splits go. Raises ConfigError if there is no such folder, OSError, DataWorkerFailed, and
    DatasetError if a file changed meanwhile; content never raises.
    """
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        files = open_splits(settings, Path(spool))
        if tokenizer is None:
            return _read_and_judge(settings, files, on_progress), {}
        if cache is None:
            with TemporaryDirectory(prefix="nested-tune-") as private:
                folder = Path(private)
                report = _read_and_judge(
                    settings, files, on_progress, tokenizer=tokenizer, folder=folder
                )
                return report, write_manifest_and_open_tokens(folder)
        entry = cache.entry_for(settings, files, tokenizer)
        cached = entry.read_report_and_tokens()
        if cached is not None:
            return cached
        with entry.creating() as folder:
            report = _read_and_judge(
                settings, files, on_progress, tokenizer=tokenizer, folder=folder
            )
            write_report_beside_tokens(folder, report)
            if cache.entry_for(settings, files, tokenizer) != entry:  # else it is kept as another's
                raise DatasetError(f"{settings.data} changed while it was judged. Start again.")
            return report, write_manifest_and_open_tokens(folder)


def _read_and_judge(
    settings: DataSettings,
    files: Mapping[str, SplitFile],
    on_progress: OnProgress | None,
    *,
    tokenizer: TokenizerSource | None = None,
    folder: Path | None = None,
) -> DatasetReport:
    """Read the files and `judge_dataset`; both are imported when needed, their libraries are slow.

    Those of the rules, which take 80 MiB, are so only when the processes that read are gone.
    """
    from nested_core.data.split_table import read_tables_with_repeats

    tables = read_tables_with_repeats(files, settings, on_progress)
    from nested_core.data.dataset_validation import judge_dataset

    return judge_dataset(settings, tables, on_progress, tokenizer=tokenizer, folder=folder)
