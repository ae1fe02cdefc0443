"""A data set with train, valid and test -> a report on all of it, and tokens of what is sound.

Refuses nothing by itself: the caller asks the report with `raise_if_rejected`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from nested_core.data.encoding import has_chat_template
from nested_core.data.judging import judge
from nested_core.data.lines import Lines, judge_files, judge_lines, read_lines
from nested_core.data.report import DatasetReport, Finding, SplitStats, in_order
from nested_core.data.settings import DataSettings
from nested_core.data.sources import open_sources
from nested_core.data.summary import count_split, count_tokens, describe_split
from nested_core.data.token_files import seal_tokens
from nested_core.data.token_rules import (
    TemplateErrors,
    TokenErrors,
    TokenWarnings,
    problem_frame,
    token_frame,
)
from nested_core.data.tokenizing import SoundLines, TokenFacts, tokenize_splits
from nested_core.data.tokens import TokenizedSplit
from nested_core.data.workers import OnProgress
from nested_core.durable import canonical_json, new_directory
from nested_core.tokenizer import TokenizerSource


def load_dataset(
    settings: DataSettings,
    tokenizer: TokenizerSource | None,
    on_progress: OnProgress | None = None,
    *,
    tokens_folder: Path | None = None,
) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
    """Read, judge and (with a tokenizer) tokenise a data set.

    The splits returned hold each sound line of each split that exists, in the order of the file.
    They are mapped from `tokens_folder`, which is made anew, or from files that go when the splits
    go. Raises ConfigError where there is no such folder, OSError, WorkerFailed; content never
    raises.
    """
    facts: dict[str, TokenFacts] = {}
    tokenized: dict[str, TokenizedSplit] = {}
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        sources = open_sources(settings, Path(spool))
        splits = read_lines(sources, settings, on_progress)
        has_template = tokenizer is None or has_chat_template(tokenizer.load())
        findings = [
            *judge_lines(splits),
            *judge_files(splits, settings, lacks_template=not has_template),
        ]
        if tokenizer is not None:
            sound = _sound_lines(splits, findings, has_template=has_template)
            with _made(tokens_folder) as folder:
                facts = tokenize_splits(folder, sound, settings, tokenizer, on_progress=on_progress)
                tokenized = seal_tokens(folder)
    for split, found in facts.items():
        findings += _judge_tokens(found, splits[split].file, settings.max_seq_length)
    return _write_report(settings, splits, findings, facts), tokenized


@contextmanager
def _made(folder: Path | None) -> Iterator[Path]:
    """A folder to write in, kept at `folder`, or removed: what is mapped from it stays readable."""
    if folder is not None:
        with new_directory(folder, replace=True) as place:
            yield place
    else:
        with TemporaryDirectory(prefix="nested-tune-") as private:
            yield Path(private)


def _sound_lines(
    splits: dict[str, Lines], findings: list[Finding], *, has_template: bool
) -> dict[str, SoundLines]:
    """What can be tokenised: lines without an error, of splits that the tokenizer has a way for."""
    return {
        split: SoundLines(lines.source, frozenset(_bad_lines(findings, lines.file)))
        for split, lines in splits.items()
        if lines.source is not None and (lines.format == "text" or has_template)
    }


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
    facts: dict[str, TokenFacts],
) -> DatasetReport:
    counted: dict[str, SplitStats] = {}
    for split, lines in splits.items():
        if lines.source is not None:
            rejected = len(_bad_lines(findings, lines.file))
            counted[split] = count_split(lines.file, lines.frame, rejected, lines.digest)
            if split in facts:
                tokens = count_tokens(facts[split], settings)
                counted[split] = replace(counted[split], tokens=tokens)
    infos = [
        info for stats in counted.values() for info in describe_split(stats, settings.batch_size)
    ]
    files = [lines.file for lines in splits.values()]
    digests = {split: stats.digest for split, stats in counted.items()}
    digest = sha256(canonical_json(digests)).hexdigest()
    return DatasetReport(settings.place, digest, counted, in_order(findings + infos, files))
