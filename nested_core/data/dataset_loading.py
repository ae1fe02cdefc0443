"""Load a data set: a report on all of it, and the tokens of its valid examples.

Both come from the cache if nothing has changed since they were made. An entry is keyed by
everything that the result depends on, and hashed when it is read, so that a damaged one is made
again. Each user has a cache of their own, and a folder that others may write to is refused. A data
set with errors is not refused here: callers use `raise_if_rejected` of the report.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic_core import to_jsonable_python

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import DataPolicy
from nested_core.data.data_settings import REPLAY_SPLIT, DataSettings
from nested_core.data.earlier_examples import find_earlier_examples
from nested_core.data.parallel_jobs import OnProgress
from nested_core.data.sources.split_files import SplitFile, open_splits
from nested_core.data.tokens.text_notes import TokenizerChecks
from nested_core.data.tokens.tokenized_split import (
    TokenizedSplit,
    open_tokens,
    write_manifest_and_open_tokens,
)
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError, DamagedError, DatasetError
from nested_core.models.base_model import fingerprint_tokenizer
from nested_core.records.dataset import DatasetReport
from nested_core.storage.atomic import digest_json, temporary_beside, write_json
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import read_json, regular_sha256
from nested_core.storage.user_cache import UserCache, cache_folder, remove_entry

REPORT_NAME = "report.json"
# Checks of what a row has: rows that were kept under another `training.loss` fail one of them.
CHECKS_OF_ANOTHER_LOSS = ("missing-field", "preference-pair", "unknown-format")
# All that a line's judgement or tokens may depend on; jinja2 renders the chat templates.
_LIBRARIES_IN_CACHE_KEY = (
    "transformers",
    "tokenizers",
    "jinja2",
    "mlx-lm",
    "pydantic",
    "pandera",
    "polars",
)
# Modules outside of this package that decide what is read, or how a message is worded.
_OTHER_CODE_IN_CACHE_KEY = (
    "errors.py",
    "models/chat_template.py",
    "models/tokenizer_cell.py",
    "storage/untrusted_files.py",
    "storage/atomic.py",
    "text/groups.py",
    "text/words.py",
)
_log = logging.getLogger(__name__)


def dataset_cache(folder: Path | None = None) -> UserCache:
    """Return the cache of data sets, by default `datasets` in the user's cache folder."""
    place = folder or cache_folder() / "datasets"
    return UserCache(place, "checked data sets", "pass any data set as sound")


def _read_report_and_tokens(entry: Path) -> tuple[DatasetReport, dict[str, TokenizedSplit]] | None:
    """Read a cache entry; None if it does not exist. A damaged one is removed with a warning."""
    try:
        splits = open_tokens(entry)
        report = DatasetReport.from_json(read_json(entry / REPORT_NAME, None))
        os.utime(entry)
    except (DamagedError, FileNotFoundError) as error:
        if entry.exists():  # else there was none, or another process took it away
            _log.warning("The cached data set is damaged and is made again: %s", error)
            remove_entry(entry)
        return None
    return report, splits


@contextmanager
def _creating(entry: Path) -> Iterator[Path]:
    """Yield a new folder that becomes the cache entry when the block ends.

    If several processes create the same entry at once, the first to end wins; the others' folders
    are removed, and their memory maps stay valid. Nothing is synced to disk, since a damaged entry
    is detected and made again.
    """
    unpublished = temporary_beside(entry)
    unpublished.mkdir()
    try:
        yield unpublished
        try:
            unpublished.rename(entry)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(unpublished, ignore_errors=True)


def _depends_on(
    settings: DataSettings, files: Mapping[str, SplitFile], tokenizer: TokenizerSource
) -> dict[str, object]:
    """Return everything that a data set's report and tokens depend on, as JSON values."""
    return {
        "settings": to_jsonable_python(settings),
        "incomplete_folder": settings.describe_incomplete_folder(files),
        "files": {split: _describe_file_for_key(file) for split, file in files.items()},
        "tokenizer": asdict(tokenizer),
        "tokenizer_files": fingerprint_tokenizer(Path(tokenizer.folder)),
        "checks": [part.depends_on(tokenizer) for part in seams.load_all(TokenizerChecks)],
        "rules": _hash_data_code(),
    }


def _describe_file_for_key(file: SplitFile) -> dict[str, object]:
    """Return the name, content hash and line numbers of a split's file, for the cache key."""
    return {
        "name": file.name,
        "content": regular_sha256(file.path, follow_links=True),
        "numbers": file.numbers is not None and sha256(file.numbers.tobytes()).hexdigest(),
        "problems": sorted(file.problems.items()),
        "parts": to_jsonable_python(file.parts),
        "delimiters": file.delimiters,
        "tags": dict(file.tags),
    }


@lru_cache(maxsize=1)
def _hash_data_code() -> str:
    """Return a hash of the code that reads, checks and tokenizes data, and of its libraries.

    It is part of the cache key, so that an edit of a rule invalidates the cache.
    """
    root = Path(__file__).parents[1]
    paths = [
        *sorted((root / "data").rglob("*.py")),
        *(root / name for name in _OTHER_CODE_IN_CACHE_KEY),
        *(
            path
            for name, room in seams.list_rooms().items()
            if room.parts.keys() & {"NearDuplicates", "RowChecks", "RowFormats"}
            for path in sorted((root / "rooms" / name).glob("*.[pt]*"))
        ),
    ]
    hashes = {p.relative_to(root).as_posix(): regular_sha256(p, follow_links=True) for p in paths}
    return digest_json([hashes, *map(version, _LIBRARIES_IN_CACHE_KEY)])


def load_run_data(
    config: FineTuneConfig, run: RunDirectory | None = None, on_progress: OnProgress | None = None
) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
    """Load the configured data set with the user's cache; return report and tokens by split.

    run: adds the earlier examples that the run replays as split `replay`, and drops new examples
        that earlier data holds out.

    Raises DamagedError if replay.json or replay.jsonl is missing or altered.
    """
    settings = DataSettings.from_config(config)
    tokenizer = TokenizerSource.from_config(config)
    cache = dataset_cache()
    earlier = None if run is None else find_earlier_examples(config, run)
    if run is None or earlier is None:
        return load_dataset(settings, tokenizer, on_progress, cache=cache)
    earlier.require_rows()
    settings = replace(settings, held_out_before=earlier.find_dropped())
    report, splits = load_dataset(settings, tokenizer, on_progress, cache=cache)
    if earlier.count():
        replay = replay_settings(settings, run.replayed_rows)
        replayed, loaded = load_dataset(replay, tokenizer, on_progress, cache=cache)
        splits[REPLAY_SPLIT] = loaded["train"]
        _require_rows_of_loss(replayed, settings.loss)
    return report, splits


def _require_rows_of_loss(report: DatasetReport, loss: str | None) -> None:
    """Raise ConfigError if replayed rows of earlier nights are of another `training.loss`."""
    if wrong := [one for one in report.findings if one.check in CHECKS_OF_ANOTHER_LOSS]:
        raise ConfigError(
            f"continual.replay: earlier nights had another training.loss than {loss or 'null'}, so "
            f"that their examples cannot be replayed ({wrong[0].message}). Set "
            f"continual.replay.fraction: 0, or train under another registry.name with this loss."
        )


def replay_settings(settings: DataSettings, rows: Path) -> DataSettings:
    """Return the settings to read replay.jsonl: default keys, supervised as the run's examples."""
    policy = DataPolicy(roles=settings.policy.roles, overlong=settings.policy.overlong)
    return DataSettings(
        data=str(rows),
        batch_size=settings.batch_size,
        max_seq_length=settings.max_seq_length,
        mask_prompt=settings.mask_prompt,
        supervise=settings.supervise,
        policy=policy,
        loss=settings.loss,
    )


def load_dataset(
    settings: DataSettings,
    tokenizer: TokenizerSource | None,
    on_progress: OnProgress | None = None,
    *,
    cache: UserCache | None = None,
) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
    """Read, check and (with a tokenizer) tokenize a data set, or take both from the cache.

    Returns the report, and the tokens of the valid lines of each split, in the order of the file,
    without lines that data_policy drops. The tokens are memory-mapped from the cache or from
    temporary files. Raises ConfigError if there is no such folder, OSError, DataWorkerFailed, and
    DatasetError if a file changed meanwhile; faults of the content are in the report.
    """
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        files = open_splits(settings, Path(spool))
        judge = partial(_read_and_judge, settings, files, on_progress, tokenizer)
        if tokenizer is None:
            return judge(folder=None), {}
        if cache is None:
            with TemporaryDirectory(prefix="nested-tune-") as private:
                report = judge(folder=Path(private))
                return report, write_manifest_and_open_tokens(Path(private))
        entry = cache.entry(_depends_on(settings, files, tokenizer))
        if (cached := _read_report_and_tokens(entry)) is not None:
            return cached
        cache.remove_unused()
        with _creating(entry) as folder:
            report = judge(folder=folder)
            write_json(folder / REPORT_NAME, report.to_json())
            if cache.entry(_depends_on(settings, files, tokenizer)) != entry:
                raise DatasetError(f"{settings.data} changed while it was checked. Start again.")
            return report, write_manifest_and_open_tokens(folder)


def _read_and_judge(
    settings: DataSettings,
    files: Mapping[str, SplitFile],
    on_progress: OnProgress | None,
    tokenizer: TokenizerSource | None,
    *,
    folder: Path | None,
) -> DatasetReport:
    """Read the files of a data set and check them; write the tokens to `folder`, if given.

    Slow libraries are imported here; those of the rules, which take 80 MiB, only after the reading
    processes have ended.
    """
    from nested_core.data.split_table import read_tables_with_repeats

    tables = read_tables_with_repeats(files, settings, on_progress)
    from nested_core.data.dataset_validation import judge_dataset

    return judge_dataset(settings, tables, on_progress, tokenizer=tokenizer, folder=folder)
