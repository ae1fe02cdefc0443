"""A folder with train, valid and test -> a report on all of it, and tokens of what is sound.

Refuses nothing by itself: the caller asks the report with `raise_if_rejected`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nested_core.data.gathering import Progress
from nested_core.data.judging import judge
from nested_core.data.lines import Lines, judge_files, judge_lines, read_lines
from nested_core.data.reading import read_examples
from nested_core.data.report import DatasetReport, Finding, SplitStats, in_order
from nested_core.data.settings import DataSettings
from nested_core.data.sources import open_folder
from nested_core.data.summary import count_split, count_tokens, describe_split
from nested_core.data.token_rules import (
    TemplateErrors,
    TokenErrors,
    TokenWarnings,
    problem_frame,
    token_frame,
)
from nested_core.data.tokens import TokenFacts, TokenizedSplit, has_chat_template, tokenize
from nested_core.durable import canonical_json


def load_dataset(
    settings: DataSettings, tokenizer: Any | None, on_progress: Progress | None = None
) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
    """Read, judge and (with mlx_lm's tokenizer) tokenise a data set.

    The splits returned hold each sound line of each split that exists, in the order of the file.
    Raises ConfigError where there is no such folder, OSError, WorkerFailed; content never raises.
    """
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        sources = open_folder(settings.data, settings.json_keys, Path(spool))
        splits = read_lines(sources, settings, on_progress)
        lacks_template = tokenizer is not None and not has_chat_template(tokenizer)
        findings = [
            *judge_lines(splits),
            *judge_files(splits, settings, lacks_template=lacks_template),
        ]
        tokenized = {}
        if tokenizer is not None:
            tokenized = _tokenize_splits(splits, settings, tokenizer, findings)
    for split, (_, facts) in tokenized.items():
        findings += _judge_tokens(facts, splits[split].file, settings.max_seq_length)
    report = _write_report(settings, splits, findings, tokenized)
    return report, {split: tokens for split, (tokens, _) in tokenized.items()}


def _tokenize_splits(
    splits: dict[str, Lines], settings: DataSettings, tokenizer: Any, findings: list[Finding]
) -> dict[str, tuple[TokenizedSplit, TokenFacts]]:
    tokenized = {}
    for split, lines in splits.items():
        source = lines.source
        if source is not None and (lines.format == "text" or has_chat_template(tokenizer)):
            skip = source.lines_of(_bad_lines(findings, lines.file))
            examples = read_examples(source.path, settings.features, skip)
            tokenized[split] = tokenize(
                ((source.number_of(line), example) for line, example in examples),
                tokenizer,
                max_seq_length=settings.max_seq_length,
                mask_prompt=settings.mask_prompt,
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
    splits: dict[str, Lines],
    findings: list[Finding],
    tokenized: dict[str, tuple[TokenizedSplit, TokenFacts]],
) -> DatasetReport:
    counted: dict[str, SplitStats] = {}
    for split, lines in splits.items():
        if lines.source is not None:
            rejected = len(_bad_lines(findings, lines.file))
            counted[split] = count_split(lines.file, lines.frame, rejected, lines.digest)
            if split in tokenized:
                counted[split] = replace(counted[split], tokens=count_tokens(*tokenized[split]))
    infos = [info for stats in counted.values() for info in describe_split(stats)]
    files = [lines.file for lines in splits.values()]
    digests = {split: stats.digest for split, stats in counted.items()}
    digest = sha256(canonical_json(digests)).hexdigest()
    return DatasetReport(settings.data, digest, counted, in_order(findings + infos, files))
