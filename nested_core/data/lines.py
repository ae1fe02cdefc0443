"""The lines of all splits read, related to each other and judged, before any is tokenised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import polars as pl

from nested_core.data.file_rules import FileErrors, FileWarnings
from nested_core.data.frame import relate_rows
from nested_core.data.gathering import Gathered, gather_files
from nested_core.data.judging import judge
from nested_core.data.kind_rules import KindWarnings, kind_frame
from nested_core.data.report import Finding
from nested_core.data.rules import RowErrors, RowWarnings
from nested_core.data.settings import SPLITS, DataSettings
from nested_core.data.sources import Source
from nested_core.data.workers import OnProgress

_EMPTY = Gathered.of_nothing()


@dataclass(frozen=True)
class Lines:
    """One split as read and related to the others: a row for each line."""

    file: str
    source: Source | None  # None where there is no such split
    frame: pl.DataFrame
    digest: str

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
    frames = relate_rows(
        [(file, gathered.get(split, _EMPTY).frame) for split, file in files.items()]
    )
    return {
        split: Lines(file, sources.get(split), frame, gathered.get(split, _EMPTY).digest)
        for (split, file), frame in zip(files.items(), frames, strict=True)
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
            "lines": lines.frame.height,
            "rows": int((~lines.frame["is_blank"]).sum()),
            "batch_size": settings.batch_size,
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
