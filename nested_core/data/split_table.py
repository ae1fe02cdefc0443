"""Read train, valid and test to tables with a row for each line, on all cores.

Small files are read in this process, by the same job. Nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import polars as pl

from nested_core import seams
from nested_core.data.data_settings import SPLITS, DataSettings
from nested_core.data.lines.example_parsing import FieldNames
from nested_core.data.lines.line_table import (
    LINE_SCHEMA,
    NEAR_DUPLICATES_KEY,
    RANGE_BYTES,
    run_line_range_job,
)
from nested_core.data.parallel_jobs import (
    OnProgress,
    count_processes_for,
    cut_file_into_line_ranges,
    run_jobs,
)
from nested_core.data.room_checks import NearDuplicates, RowChecks, SharedWithTrain
from nested_core.data.rules.related_lines import (
    Dropped,
    add_repeat_columns,
    find_lines_by_content,
    separate_dropped_lines,
)
from nested_core.data.sources.split_files import SplitFile
from nested_core.storage.untrusted_files import read_regular

HELD_OUT_SPLITS = SPLITS[1:]
LINE_RANGE_JOB = f"{run_line_range_job.__module__}:{run_line_range_job.__name__}"


@dataclass(frozen=True)
class SplitTable:
    """One split as a table.

    frame: a row for each physical line, see LINE_SCHEMA, with its original number as `line`.
        `read_tables_with_repeats` adds the relations to other lines.
    """

    file: str
    source: SplitFile | None  # None: there is no such split
    frame: pl.DataFrame
    digest: str  # SHA-256 over the SHA-256 of each example in it
    has_one_answer: bool  # no two examples have different answers
    dropped: Dropped = field(default_factory=dict)  # the lines that data_policy drops, by reason

    @property
    def file_names(self) -> list[str]:
        """The name that findings use for the split, and the names of its files if several."""
        parts = () if self.source is None else self.source.parts
        return [self.file, *(part.name for part in parts)]

    @property
    def format(self) -> str | None:
        """The format of most rows; None without any example."""
        formats = self.frame["file_format"].drop_nulls()
        return formats[0] if len(formats) else None


def read_tables_with_repeats(
    files: Mapping[str, SplitFile], settings: DataSettings, on_progress: OnProgress | None
) -> dict[str, SplitTable]:
    """Read all splits, mark lines that repeat others, and decide which lines of train are dropped.

    With more than one split, held-out rows that nearly are a row of train are marked too, if the
    optional package for near-duplicates is there and the settings ask for it (`near`).
    """
    near = _load_near_duplicates(settings) if len(files) > 1 else None
    tables, matches = _read_held_out_first(files, settings.field_names, on_progress, near)
    tables_as_read = tables
    if near is not None:
        # The n-gram columns of `tables_as_read` serve only for near.relate below
        tables = {
            name: replace(table, frame=table.frame.drop(near.schema, strict=False))
            for name, table in tables_as_read.items()
        }
    # Rows of train that an earlier version holds out are dropped
    before = find_lines_by_content(tables["train"].frame, settings.held_out_before)
    train, *held_out = add_repeat_columns([(t.file, t.frame) for t in tables.values()])
    if near is not None and matches is not None:
        # The n-grams of train that held-out rows have too
        shared = matches.finish(train["line"])
        held_out = [
            near.relate(frame, tables_as_read[name].frame, shared, matches.examples)
            for name, frame in zip(HELD_OUT_SPLITS, held_out, strict=True)
        ]
    train, held_out, dropped = separate_dropped_lines(train, held_out, settings.policy, before)
    related = {
        name: replace(table, frame=frame)
        for (name, table), frame in zip(tables.items(), [train, *held_out], strict=True)
    }
    return related | {"train": replace(related["train"], dropped=dropped)}


def _load_near_duplicates(settings: DataSettings) -> NearDuplicates | None:
    """Return the room part that finds near-duplicates; None if it is off or not installed.

    Raises ConfigError if `data_policy.near_duplicates: error` needs the room and it is not
    installed.
    """
    asked = settings.policy.near_duplicates
    if asked == "error":
        seams.require("near_duplicates", NEAR_DUPLICATES_KEY)
    return None if asked == "off" else next(seams.load_all(NearDuplicates), None)


def _read_held_out_first(
    files: Mapping[str, SplitFile],
    field_names: FieldNames,
    on_progress: OnProgress | None,
    near: NearDuplicates | None,
) -> tuple[dict[str, SplitTable], SharedWithTrain | None]:
    """Read all splits, the held-out ones first, and find n-grams that train shares with them.

    near: finds near-duplicates; None leaves this out.

    Returns the tables by split, and the shared n-grams (None without `near`). These are added while
    train is read: its worker processes look for the held-out rows' n-grams, which a file holds.
    """
    matches = None if near is None else near.start_matching()
    with TemporaryDirectory(prefix="nested-tune-") as folder:
        reading = _Reading(files, field_names, on_progress, Path(folder))
        schema = {} if near is None else near.schema
        held_out = {name: reading.read(name, more_columns=schema) for name in HELD_OUT_SPLITS}
        ngram_file = None
        if near is not None:
            ngram_file = Path(folder, "asked")
            near.collect([table.frame for table in held_out.values()]).write(ngram_file)
        train = reading.read("train", asked=ngram_file, matches=matches)
    return {"train": train} | held_out, matches


class _Reading:
    """Reads a data set's files: workers write the rows of each range of lines to a folder."""

    def __init__(
        self,
        files: Mapping[str, SplitFile],
        field_names: FieldNames,
        on_progress: OnProgress | None,
        folder: Path,
    ) -> None:
        """Cut the files into ranges of lines; workers write their rows to `folder`.

        files: by split. on_progress: is told how many bytes of all files have been read.
        """
        self._files = files
        self._field_names = field_names
        self._on_progress = on_progress
        self._folder = folder
        self._ranges = {s: cut_file_into_line_ranges(f.path, RANGE_BYTES) for s, f in files.items()}
        self._total = sum(r.end - r.start for ranges in self._ranges.values() for r in ranges)
        self._bytes_done = 0

    def read(
        self,
        split: str,
        *,
        more_columns: Mapping[str, object] = MappingProxyType({}),
        asked: Path | None = None,
        matches: SharedWithTrain | None = None,
    ) -> SplitTable:
        """Read all lines of a split to a table, by worker processes that read a range each.

        split: a split without a file gives a table without rows.
        more_columns: n-gram columns to add, for finding near-duplicates: name and type of each.
        asked: a file with n-grams to look for in the lines; what is found is added to `matches`.
        """
        file = self._files.get(split)
        ranges = self._ranges.get(split, [])
        requests: list[dict[str, object]] = [
            {
                "job": LINE_RANGE_JOB,
                "path": str(self._files[split].path),
                "byte_range": byte_range,
                "field_names": asdict(self._field_names),
                "has_ngrams": bool(more_columns),
                "asked": None if asked is None else str(asked),
                "out": f"{self._folder}/{split}-{byte_range.start}",
            }
            for byte_range in ranges
        ]
        sizes = [byte_range.end - byte_range.start for byte_range in ranges]
        answers = run_jobs(
            requests,
            processes=count_processes_for(sum(sizes)),
            on_done=lambda done: self._report_progress(self._bytes_done + sum(sizes[:done])),
        )
        # Join the answers in the order of the file
        hasher = sha256()  # of the hashes of all examples
        answer_keys: set[int] = set()
        rows = 0
        with closing(answers):  # type: ignore[type-var]  # ends the workers
            for request, answer in zip(requests, answers, strict=True):
                out = request["out"]
                hasher.update(_take_file(f"{out}.digests"))
                answer_keys.update(answer["answer_keys"])
                if matches is not None and asked is not None:
                    shared = pl.read_ipc(_take_file(f"{out}.shared"))
                    matches.add_range(shared, answer["examples"], first_row=rows)
                rows += answer["rows"]
        self._bytes_done += sum(sizes)
        # The rows stay on the disk while there are workers: memory holds the ones or the others.
        frames = _read_range_frames([f"{request['out']}.rows" for request in requests])
        return SplitTable(
            file.name if file is not None else f"{split}.jsonl",
            file,
            _join_range_frames(frames, file, more_columns),
            hasher.hexdigest(),
            has_one_answer=len(answer_keys) < 2,
        )

    def _report_progress(self, done: int) -> None:
        """Report how many bytes have been read."""
        if self._on_progress is not None and self._total:  # files may all be empty
            self._on_progress("reading the data", done, self._total)


def _take_file(path: str) -> bytes:
    """Read a file that a job wrote, and delete it."""
    content = read_regular(Path(path))
    Path(path).unlink()
    return content


def _read_range_frames(paths: list[str]) -> list[pl.DataFrame]:
    """Read the frames of all ranges, add line numbers from 1, and delete the files.

    All columns of a frame have the same chunks; if they differed, polars would copy the frame.
    """
    frames: list[pl.DataFrame] = []
    first = 1
    for path in paths:
        rows = pl.read_ipc(_take_file(path))
        numbers = pl.int_range(first, first + rows.height, dtype=pl.Int32, eager=True)
        frames.append(rows.with_columns(line=numbers))
        first += rows.height
    return frames


def _join_range_frames(
    frames: list[pl.DataFrame], file: SplitFile | None, more_columns: Mapping[str, object]
) -> pl.DataFrame:
    """Concatenate the frames of a split's ranges; add missing columns, problems, line numbers."""
    checks = {k: v for part in seams.load_all(RowChecks) for k, v in part.schema.items()}
    schema: dict[str, Any] = {**LINE_SCHEMA, **checks, **more_columns, "line": pl.Int32}
    frame = pl.concat([pl.DataFrame(schema={"line": pl.Int32}), *frames], how="diagonal")
    missing = [pl.lit(None, kind).alias(name) for name, kind in schema.items() if name not in frame]
    frame = frame.with_columns(missing).select(list(schema))
    if file is not None and file.problems:
        frame = _add_line_problems(frame, file.problems)
    if file is not None and file.numbers is not None:
        frame = frame.with_columns(pl.Series("line", file.numbers))
    return frame


def _add_line_problems(frame: pl.DataFrame, problems: dict[int, tuple[str, str]]) -> pl.DataFrame:
    """Set check and message of lines that were invalid before they were converted to JSON."""
    checks, messages = zip(*problems.values(), strict=True)
    columns = {"line": list(problems), "check": checks, "message": messages}
    schema = {"line": pl.Int32, "check": pl.Categorical, "message": pl.Categorical}
    broken = pl.DataFrame(columns, schema=schema).with_columns(is_blank=False)
    return frame.update(broken, on="line", how="left")
