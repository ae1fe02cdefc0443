"""The lines of all splits read, related to each other and judged, before any is tokenised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import polars as pl

from nested_core.data.gathering import Gathered, gather_files
from nested_core.data.rules.dataset_report import Finding
from nested_core.data.rules.dropped_lines import Dropped, choose_lines
from nested_core.data.rules.file_rules import CountErrors, FileErrors, FileWarnings
from nested_core.data.rules.line_rules import RowErrors, RowWarnings
from nested_core.data.rules.repeated_lines import relate_rows
from nested_core.data.rules.rule_table import judge
from nested_core.data.rules.sensitive_rules import KindWarnings, kind_frame
from nested_core.data.settings import SPLITS, DataSettings
from nested_core.data.sources.files import Source
from nested_core.data.workers import OnProgress

_EMPTY = Gathered.of_nothing()


@dataclass(frozen=True)
class Lines:
    """One split as read and related to the others: a row for each line."""

    file: str
    source: Source | None  # None where there is no such split
    frame: pl.DataFrame
    digest: str
    dropped: Dropped = field(default_factory=dict)  # the lines that data_policy drops, by reason

    @property
    def format(self) -> str | None:
        """The format of most rows; None where there is no example."""
        formats = self.frame["file_format"].drop_nulls()
        return formats[0] if len(formats) else None


def read_lines(
    sources: Mapping[str, Source], settings: DataSettings, on_progress: OnProgress | None
) -> dict[str, Lines]:
    """Read train, valid and test, those that there are not as empty ones."""
    gathered = gather_files(sources, settings.features, on_progress)
    files = {
        split: sources[split].file if split in sources else f"{split}.jsonl" for split in SPLITS
    }
    train, *held_out = relate_rows(
        [(file, gathered.get(split, _EMPTY).frame) for split, file in files.items()]
    )
    train, held_out, dropped = choose_lines(train, held_out, settings.policy)
    return {
        split: Lines(
            file,
            sources.get(split),
            frame,
            gathered.get(split, _EMPTY).digest,
            dropped if split == "train" else {},
        )
        for (split, file), frame in zip(files.items(), [train, *held_out], strict=True)
    }


def judge_lines(splits: Mapping[str, Lines]) -> Iterator[Finding]:
    """Yield what is wrong or doubtful line by line."""
    for lines in splits.values():
        yield from judge(RowErrors, lines.frame, "error")
        yield from judge(RowWarnings, lines.frame, "warning")
        yield from judge(KindWarnings, kind_frame(lines.frame, lines.file), "warning")


def judge_files(
    splits: Mapping[str, Lines], settings: DataSettings, *, lacks_template: bool
) -> Iterator[Finding]:
    """Yield what is wrong or doubtful about a split as a whole."""
    files = [
        {
            "file": lines.file,
            "line": None,
            "split": split,
            "folder": settings.place,
            "is_present": lines.source is not None,
            "format": lines.format,
            "mask_prompt": settings.mask_prompt,
            "supervise": settings.supervise,
            "lacks_template": lacks_template and lines.format in ("chat", "completion"),
        }
        for split, lines in splits.items()
    ]
    frame = pl.DataFrame(files, schema_overrides={"line": pl.Int32, "format": pl.String})
    yield from judge(FileErrors, frame, "error")
    yield from judge(FileWarnings, frame, "warning")


def judge_counts(
    splits: Mapping[str, Lines], settings: DataSettings, dropped: Mapping[str, Dropped]
) -> Iterator[Finding]:
    """Yield what is wrong with how many rows a split has once the lines of `dropped` are gone."""
    files = [
        {
            "file": lines.file,
            "line": None,
            "split": split,
            "lines": lines.frame.height,
            "rows": int((~lines.frame["is_blank"]).sum())
            - sum(map(len, dropped.get(split, {}).values())),
            "batch_size": settings.batch_size,
        }
        for split, lines in splits.items()
        if lines.source is not None
    ]
    schema = {"line": pl.Int32, "rows": pl.Int64, "batch_size": pl.Int64}
    if files:
        yield from judge(CountErrors, pl.DataFrame(files, schema_overrides=schema), "error")
