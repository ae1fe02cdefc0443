"""A folder of train, valid and test .jsonl -> a report on all of it, tokens of what is sound.

Refuses nothing by itself: the caller asks the report with `raise_if_rejected`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import polars as pl

from nested_core.data.encoding import has_chat_template
from nested_core.data.file_rules import FileErrors, FileWarnings
from nested_core.data.frame import gather_rows, relate_rows
from nested_core.data.judging import judge
from nested_core.data.reading import read_rows
from nested_core.data.report import DatasetReport, Finding, SplitStats, in_order
from nested_core.data.rules import RowErrors, RowWarnings
from nested_core.data.settings import SPLITS, DataSettings
from nested_core.data.summary import count_split, count_tokens, describe_split
from nested_core.data.token_files import seal_tokens
from nested_core.data.token_rules import (
    TemplateErrors,
    TokenErrors,
    TokenWarnings,
    problem_frame,
    token_frame,
)
from nested_core.data.tokenizing import OnProgress, SplitLines, TokenFacts, tokenize_splits
from nested_core.data.tokens import TokenizedSplit
from nested_core.durable import canonical_json, new_directory
from nested_core.tokenizer import TokenizerSource


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
    settings: DataSettings,
    tokenizer: TokenizerSource | None,
    *,
    tokens_folder: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
    """Read, judge and (with a tokenizer) tokenise a local data set.

    The splits returned hold each sound line of each file that exists, in the order of the file.
    They are mapped from `tokens_folder`, which is made anew, or from files that go when the splits
    go. Raises ConfigError where there is no such folder, and OSError; content never raises.
    """
    splits = _read_splits(settings)
    findings = [*_judge_lines(splits), *_judge_files(splits, settings, tokenizer)]
    facts: dict[str, TokenFacts] = {}
    tokenized: dict[str, TokenizedSplit] = {}
    if tokenizer is not None:
        with _made(tokens_folder) as folder:
            facts = _tokenize(splits, settings, tokenizer, findings, folder, on_progress)
            tokenized = seal_tokens(folder)
    for split, found in facts.items():
        findings += _judge_tokens(found, f"{split}.jsonl", settings.max_seq_length)
    return _write_report(settings, splits, findings, facts), tokenized


@contextmanager
def _made(folder: Path | None) -> Iterator[Path]:
    """A folder to write in, kept at `folder`, or removed: what is mapped from it stays readable."""
    if folder is not None:
        with new_directory(folder, replace=True) as place:
            yield place
    else:
        with tempfile.TemporaryDirectory(prefix="nested-tune-") as private:
            yield Path(private)


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
    splits: dict[str, _Lines], settings: DataSettings, tokenizer: TokenizerSource | None
) -> Iterator[Finding]:
    lacks_template = tokenizer is not None and not has_chat_template(tokenizer.load())
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


def _tokenize(
    splits: dict[str, _Lines],
    settings: DataSettings,
    tokenizer: TokenizerSource,
    findings: list[Finding],
    folder: Path,
    on_progress: OnProgress | None,
) -> dict[str, TokenFacts]:
    has_template = has_chat_template(tokenizer.load())
    sound = {
        split: SplitLines(lines.path, frozenset(_bad_lines(findings, lines.file)))
        for split, lines in splits.items()
        if lines.path is not None and (lines.format == "text" or has_template)
    }
    return tokenize_splits(
        folder,
        sound,
        settings.features,
        tokenizer,
        max_seq_length=settings.max_seq_length,
        targets=settings.targets,
        on_progress=on_progress,
    )


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
    facts: dict[str, TokenFacts],
) -> DatasetReport:
    counted: dict[str, SplitStats] = {}
    for split, lines in splits.items():
        if lines.path is not None:
            rejected = len(_bad_lines(findings, lines.file))
            counted[split] = count_split(lines.file, lines.frame, rejected, lines.digest)
            if split in facts:
                counted[split] = replace(
                    counted[split], tokens=count_tokens(facts[split], settings)
                )
    infos = [
        info for stats in counted.values() for info in describe_split(stats, settings.batch_size)
    ]
    digests = {split: stats.digest for split, stats in counted.items()}
    digest = sha256(canonical_json(digests)).hexdigest()
    return DatasetReport(settings.data, digest, counted, in_order(findings + infos))
