"""Train, valid and test as tables: a row for each line, read on all cores.

Small files are read in this process, by the same job. Judges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl

from nested_core.data.data_settings import SPLITS, DataSettings
from nested_core.data.lines.example_parsing import FieldNames
from nested_core.data.lines.line_table import LINE_SCHEMA, RANGE_BYTES, run_line_range_job
from nested_core.data.lines.word_ngrams import NGRAM_SCHEMA
from nested_core.data.parallel_jobs import (
    OnProgress,
    count_processes_for,
    cut_file_into_line_ranges,
    run_jobs,
)
from nested_core.data.rules.dropped_lines import Dropped, separate_dropped_lines
from nested_core.data.rules.near_duplicates import add_near_duplicate_columns, find_near_duplicates
from nested_core.data.rules.repeated_lines import add_repeat_columns
from nested_core.data.sources.split_files import SplitFile
from nested_core.storage.strict_files import read_regular

LINE_RANGE_JOB = f"{run_line_range_job.__module__}:{run_line_range_job.__name__}"


@dataclass(frozen=True)
class SplitTable:
    """One split. frame: a row for each physical line, see LINE_SCHEMA, its number as `line`.

    `related_tables` adds what the rules need to know of other lines.
    """

    file: str
    source: SplitFile | None  # None: there is no such split
    frame: pl.DataFrame
    digest: str  # SHA-256 over the SHA-256 of each example in it
    dropped: Dropped = field(default_factory=dict)  # the lines that data_policy drops, by reason

    @property
    def format(self) -> str | None:
        """The format of most rows; None without any example."""
        formats = self.frame["file_format"].drop_nulls()
        return formats[0] if len(formats) else None


def read_tables_with_repeats(
    files: Mapping[str, SplitFile], settings: DataSettings, on_progress: OnProgress | None
) -> dict[str, SplitTable]:
    """Read the splits and relate their lines to each other; lines that go are in `dropped`."""
    has_ngrams = settings.policy.near_duplicates != "off" and len(files) > 1
    tables = read_tables(files, settings.field_names, on_progress, has_ngrams=has_ngrams)
    ngrams = [table.frame for table in tables.values()]
    frames = [frame.drop(NGRAM_SCHEMA, strict=False) for frame in ngrams]
    files_and_frames = zip([table.file for table in tables.values()], frames, strict=True)
    train, *held_out = add_repeat_columns(list(files_and_frames))
    if has_ngrams:
        near = [find_near_duplicates(ngrams[0], frame) for frame in ngrams[1:]]
        held_out = list(map(add_near_duplicate_columns, held_out, near))
    train, held_out, dropped = separate_dropped_lines(train, held_out, settings.policy)
    related = {
        name: replace(table, frame=frame)
        for (name, table), frame in zip(tables.items(), [train, *held_out], strict=True)
    }
    return related | {"train": replace(related["train"], dropped=dropped)}


def read_tables(
    files: Mapping[str, SplitFile],
    field_names: FieldNames,
    on_progress: OnProgress | None = None,
    *,
    has_ngrams: bool = False,
) -> dict[str, SplitTable]:
    """Read train, valid and test, a missing one as empty; raises OSError, and DataWorkerFailed."""
    frames: dict[str, list[pl.DataFrame]] = {split: [] for split in SPLITS}
    hashers = {split: sha256() for split in SPLITS}
    with TemporaryDirectory(prefix="nested-tune-") as folder:
        requests: list[dict[str, Any]] = [
            {
                "job": LINE_RANGE_JOB,
                "split": split,
                "path": str(file.path),
                "byte_range": byte_range,
                "field_names": asdict(field_names),
                "has_ngrams": has_ngrams,
                "out": f"{folder}/{split}-{byte_range.start}",
            }
            for split, file in files.items()
            for byte_range in cut_file_into_line_ranges(file.path, RANGE_BYTES)
        ]
        sizes = [request["byte_range"].end - request["byte_range"].start for request in requests]
        total = sum(sizes)

        def report_progress(done: int) -> None:
            if on_progress is not None and total:  # files may all be empty
                on_progress("reading the data", sum(sizes[:done]), total)

        answers = run_jobs(requests, processes=count_processes_for(total), on_done=report_progress)
        with closing(answers):  # type: ignore[type-var]
            for request, _ in zip(requests, answers, strict=True):
                frame, digests = _read_and_remove_job_files(request)
                frames[request["split"]].append(frame)
                hashers[request["split"]].update(digests)
    return {
        split: SplitTable(
            files[split].name if split in files else f"{split}.jsonl",
            files.get(split),
            _join_range_frames(frames[split], files.get(split), has_ngrams=has_ngrams),
            hashers[split].hexdigest(),
        )
        for split in SPLITS
    }


def _read_and_remove_job_files(request: dict[str, Any]) -> tuple[pl.DataFrame, bytes]:
    """What the job wrote, which is removed from the disk."""
    rows = Path(f"{request['out']}.rows")
    digests = Path(f"{request['out']}.digests")
    result = pl.read_ipc(read_regular(rows)), read_regular(digests)
    rows.unlink()
    digests.unlink()
    return result


def _join_range_frames(
    frames: list[pl.DataFrame], file: SplitFile | None, *, has_ngrams: bool
) -> pl.DataFrame:
    empty = pl.DataFrame(schema={**LINE_SCHEMA, **(NGRAM_SCHEMA if has_ngrams else {})})
    frame = pl.concat([empty, *frames], rechunk=True)
    frame = frame.with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int32).alias("line"))
    if file is not None and file.problems:
        frame = _add_line_problems(frame, file.problems)
    if file is not None and file.numbers is not None:
        frame = frame.with_columns(pl.Series("line", file.numbers))
    return frame


def _add_line_problems(frame: pl.DataFrame, problems: dict[int, tuple[str, str]]) -> pl.DataFrame:
    """What was wrong with a line before it was one, in the place of nothing."""
    checks, messages = zip(*problems.values(), strict=True)
    columns = {"line": list(problems), "check": checks, "message": messages}
    schema = {"line": pl.Int32, "check": pl.Categorical, "message": pl.String}
    broken = pl.DataFrame(columns, schema=schema).with_columns(is_blank=False)
    return frame.update(broken, on="line", how="left")
