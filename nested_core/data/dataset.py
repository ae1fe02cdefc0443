"""A data set with train, valid and test -> a report on all of it, and tokens of what is sound.

Refuses nothing by itself: the caller asks the report with `raise_if_rejected`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from nested_core.data.cache import DatasetCache, write_report
from nested_core.data.rules.dataset_report import DatasetReport
from nested_core.data.settings import DataSettings
from nested_core.data.sources.files import Source, open_sources
from nested_core.data.tokens.tokenized_split import TokenizedSplit, seal_tokens
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import DatasetError

if TYPE_CHECKING:
    from nested_core.data.workers import OnProgress


def load_dataset(
    settings: DataSettings,
    tokenizer: TokenizerSource | None,
    on_progress: OnProgress | None = None,
    *,
    cache: DatasetCache | None = None,
) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
    """Read, judge and (with a tokenizer) tokenise a data set, or take both from the cache.

    The splits returned hold each sound line of each split that exists, in the order of the file,
    but for those that data_policy drops. They are mapped from the cache, or from files that go when
    the splits go. Raises ConfigError where there is no such folder, OSError, WorkerFailed, and
    DatasetError where a file changed meanwhile; content never raises.
    """
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        sources = open_sources(settings, Path(spool))
        if tokenizer is None:
            return _judge(settings, sources, on_progress), {}
        if cache is None:
            with TemporaryDirectory(prefix="nested-tune-") as private:
                folder = Path(private)
                report = _judge(settings, sources, on_progress, into=(tokenizer, folder))
                return report, seal_tokens(folder)
        entry = cache.entry(settings, sources, tokenizer)
        if (found := entry.read()) is not None:
            return found
        with entry.made() as folder:
            report = _judge(settings, sources, on_progress, into=(tokenizer, folder))
            write_report(folder, report)
            if cache.entry(settings, sources, tokenizer) != entry:  # else it is kept as another's
                raise DatasetError(f"{settings.data} changed while it was judged. Start again.")
            return report, seal_tokens(folder)


def _judge(
    settings: DataSettings,
    sources: Mapping[str, Source],
    on_progress: OnProgress | None,
    into: tuple[TokenizerSource, Path] | None = None,
) -> DatasetReport:
    """Judge by the rules, whose libraries take a second to import: not when the cache has it."""
    from nested_core.data.judgement import judge_dataset

    return judge_dataset(settings, sources, on_progress, into)
