"""All lines of all splits -> a frame of rows for each of them, read by all cores.

Small files are read in this process, by the same job. Judges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl

from nested_core.data.lines.fields import Features
from nested_core.data.lines.reading import SCHEMA, SPAN_BYTES
from nested_core.data.sources.files import Source
from nested_core.data.workers import OnProgress, line_spans, processes_for, run_jobs

JOB = "nested_core.data.lines.reading:read_job"


@dataclass(frozen=True)
class Gathered:
    """One split: a row for each physical line, see reading.SCHEMA, with its number as `line`."""

    frame: pl.DataFrame
    digest: str  # SHA-256 over the SHA-256 of each example in it

    @classmethod
    def of_nothing(cls) -> Gathered:
        """What a split without any line gives."""
        return cls(_number(pl.DataFrame(schema=SCHEMA)), sha256().hexdigest())


def gather_files(
    sources: Mapping[str, Source], features: Features, on_progress: OnProgress | None = None
) -> dict[str, Gathered]:
    """Read the splits; raises OSError, and WorkerFailed."""
    spans = [
        (split, span)
        for split, source in sources.items()
        for span in line_spans(source.path, SPAN_BYTES)
    ]
    frames: dict[str, list[pl.DataFrame]] = {split: [] for split in sources}
    hashers = {split: sha256() for split in sources}
    sizes = list(accumulate(span.end - span.start for _, span in spans))
    total = sizes[-1] if sizes else 0

    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress("reading", sizes[done - 1], total)

    with TemporaryDirectory(prefix="nested-tune-") as folder:
        requests = [
            {
                "job": JOB,
                "path": str(sources[split].path),
                "span": [span.start, span.end],
                "features": asdict(features),
                "out": f"{folder}/{index}",
            }
            for index, (split, span) in enumerate(spans)
        ]
        answers = run_jobs(requests, processes=processes_for(total), on_done=tell)
        with closing(answers):  # type: ignore[type-var]
            for request, (split, _), _ in zip(requests, spans, answers, strict=True):
                frame, digests = _take(request)
                frames[split].append(frame)
                hashers[split].update(digests)
    return {
        split: Gathered(_join(frames[split], source), hashers[split].hexdigest())
        for split, source in sources.items()
    }


def _take(request: dict[str, Any]) -> tuple[pl.DataFrame, bytes]:
    rows, digests = Path(f"{request['out']}.rows"), Path(f"{request['out']}.digests")
    taken = pl.read_ipc(rows.read_bytes()), digests.read_bytes()
    rows.unlink()
    digests.unlink()
    return taken


def _join(frames: list[pl.DataFrame], source: Source) -> pl.DataFrame:
    frame = _number(pl.concat([pl.DataFrame(schema=SCHEMA), *frames], rechunk=True))
    if source.problems:
        frame = _add_problems(frame, source.problems)
    if source.numbers is not None:
        frame = frame.with_columns(pl.Series("line", source.numbers))
    return frame


def _number(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int32).alias("line"))


def _add_problems(frame: pl.DataFrame, problems: dict[int, tuple[str, str]]) -> pl.DataFrame:
    """What was wrong with a line before it was one, in the place of nothing."""
    checks, messages = zip(*problems.values(), strict=True)
    columns = {"line": list(problems), "check": checks, "message": messages}
    found = pl.DataFrame(
        columns, schema={"line": pl.Int32, "check": pl.Categorical, "message": pl.String}
    ).with_columns(is_blank=False)
    return frame.update(found, on="line", how="left")
