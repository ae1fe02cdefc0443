"""A folder of train, valid and test .jsonl -> a report on all of it, and tokens of what is sound.

Refuses nothing by itself: the caller asks the report with `raise_if_rejected`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import polars as pl

from nested_core.data.encoding import has_chat_template
from nested_core.data.file_rules import FileErrors, FileWarnings
from nested_core.data.frame import gather_rows, relate_rows
from nested_core.data.judging import judge
from nested_core.data.reading import read_examples, read_rows
from nested_core.data.report import DatasetReport, Finding, SplitStats, in_order
from nested_core.data.rules import RowErrors, RowWarnings
from nested_core.data.settings import SPLITS, DataSettings
from nested_core.data.summary import count_split, count_tokens, describe_split
from nested_core.data.token_rules import (
    TemplateErrors,
    TokenErrors,
    TokenWarnings,
    problem_frame,
    token_frame,
)
from nested_core.data.tokens import TokenFacts, TokenizedSplit, tokenize
from nested_core.durable import canonical_json


@dataclass(frozen=True)
class _Lines:
    """One split as read and related to the others: a row for each physical line."""

    file: str
    path: Path | None  # None where there is no such file
    frame: pl.DataFrame
    digest: str

    @property
    def format(self) -> str | None:
        formats = self.frame["file_format"].drop_nulls()
        return formats[0] if len(formats) else None


def load_dataset(
    settings: DataSettings, tokenizer: Any | None
) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
    """Read, judge and (with mlx_lm's tokenizer) tokenise a local data set.

    The splits returned hold each sound line of each file that exists, in the order of the file.
    Raises ConfigError where there is no such folder, and OSError; content never raises.
    """
    splits = _read_splits(settings)
    findings = [*_judge_lines(splits), *_judge_files(splits, settings, tokenizer)]
    tokenized = {}
    if tokenizer is not None:
        tokenized = _tokenize_splits(splits, settings, tokenizer, findings)
    for split, (_, facts) in tokenized.items():
        findings += _judge_tokens(facts, f"{split}.jsonl", settings.max_seq_length)
    report = _write_report(settings, splits, findings, tokenized)
    return report, {split: tokens for split, (tokens, _) in tokenized.items()}


def _read_splits(settings: DataSettings) -> dict[str, _Lines]:
    paths, frames, digests = settings.paths(), {}, {}
    for split in SPLITS:
        rows = read_rows(paths[split], settings.features) if split in paths else iter(())
        frames[split], digests[split] = gather_rows(rows)
    heights = {split: frame.height for split, frame in frames.items()}
    related, lines, start = relate_rows(frames), {}, 0
    for split in SPLITS:
        frame = related.slice(start, heights[split])  # a view, not a copy
        lines[split] = _Lines(f"{split}.jsonl", paths.get(split), frame, digests[split])
        start += heights[split]
    return lines


def _judge_lines(splits: dict[str, _Lines]) -> Iterator[Finding]:
    for lines in splits.values():
        yield from judge(RowErrors, lines.frame, "error")
        yield from judge(RowWarnings, lines.frame, "warning")


def _judge_files(
    splits: dict[str, _Lines], settings: DataSettings, tokenizer: Any | None
) -> Iterator[Finding]:
    lacks_template = tokenizer is not None and not has_chat_template(tokenizer)
    files = [
        {
            "file": lines.file,
            "line": None,
            "split": split,
            "folder": settings.data,
            "is_present": lines.path is not None,
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


def _tokenize_splits(
    splits: dict[str, _Lines], settings: DataSettings, tokenizer: Any, findings: list[Finding]
) -> dict[str, tuple[TokenizedSplit, TokenFacts]]:
    tokenized = {}
    for split, lines in splits.items():
        if lines.path is not None and (lines.format == "text" or has_chat_template(tokenizer)):
            skip = _bad_lines(findings, lines.file)
            tokenized[split] = tokenize(
                read_examples(lines.path, settings.features, skip),
                tokenizer,
                max_seq_length=settings.max_seq_length,
                targets=settings.targets,
            )
    return tokenized


def _judge_tokens(facts: TokenFacts, file: str, max_seq_length: int) -> Iterator[Finding]:
    frame = token_frame(facts, file, max_seq_length)
    yield from judge(TemplateErrors, problem_frame(facts, file), "error")
    yield from judge(TokenErrors, frame, "error")
    yield from judge(TokenWarnings, frame, "warning")


def _bad_lines(findings: list[Finding], file: str) -> set[int]:
    return {
        finding.line
        for finding in findings
        if finding.severity == "error" and finding.file == file and finding.line is not None
    }


def _write_report(
    settings: DataSettings,
    splits: dict[str, _Lines],
    findings: list[Finding],
    tokenized: dict[str, tuple[TokenizedSplit, TokenFacts]],
) -> DatasetReport:
    counted: dict[str, SplitStats] = {}
    for split, lines in splits.items():
        if lines.path is not None:
            rejected = len(_bad_lines(findings, lines.file))
            counted[split] = count_split(lines.file, lines.frame, rejected, lines.digest)
            if split in tokenized:
                counted[split] = replace(counted[split], tokens=count_tokens(*tokenized[split]))
    infos = [info for stats in counted.values() for info in describe_split(stats)]
    digests = {split: stats.digest for split, stats in counted.items()}
    digest = sha256(canonical_json(digests)).hexdigest()
    return DatasetReport(settings.data, digest, counted, in_order(findings + infos))
