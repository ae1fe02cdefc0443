"""Every line of a data set read and judged, and what is sound tokenised.

With polars and pandera, which a data set that is in the cache does without: see dataset.py. Refuses
nothing by itself: the report says what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from nested_core.data.all_lines import Lines, judge_counts, judge_files, judge_lines, read_lines
from nested_core.data.rules.dataset_report import DatasetReport, Finding, SplitStats, in_order
from nested_core.data.rules.dropped_lines import Dropped, tell_dropped
from nested_core.data.rules.rule_table import judge
from nested_core.data.rules.split_statistics import count_split, count_tokens, describe_split
from nested_core.data.rules.token_rules import (
    TemplateErrors,
    TokenErrors,
    TokenWarnings,
    problem_frame,
    token_frame,
)
from nested_core.data.settings import DataSettings
from nested_core.data.sources.files import Source
from nested_core.data.tokens.example_encoding import has_chat_template
from nested_core.data.tokens.parallel_tokenization import SoundLines, TokenFacts, tokenize_splits
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.data.workers import OnProgress
from nested_core.storage.atomic import canonical_json


def judge_dataset(
    settings: DataSettings,
    sources: Mapping[str, Source],
    on_progress: OnProgress | None,
    into: tuple[TokenizerSource, Path] | None = None,
) -> DatasetReport:
    """Read and judge every line; with a tokenizer, write what is sound as tokens into a folder."""
    splits = read_lines(sources, settings, on_progress)
    has_template = into is None or has_chat_template(into[0].load())
    findings = [
        *judge_lines(splits),
        *judge_files(splits, settings, lacks_template=not has_template),
    ]
    dropped = _dropped_lines(splits, findings)
    facts: dict[str, TokenFacts] = {}
    if into is not None:
        tokenizer, folder = into
        sound = _sound_lines(splits, findings, dropped, has_template=has_template)
        facts = tokenize_splits(folder, sound, settings, tokenizer, on_progress=on_progress)
    for split, found in facts.items():
        findings += _judge_tokens(found, splits[split].file, settings)
        if found.overlong:
            dropped[split] = {**dropped[split], "overlong": found.overlong}
    findings += judge_counts(splits, settings, dropped)
    for split, lines in splits.items():
        findings += tell_dropped(lines.file, dropped[split])
    return _make_report(settings, splits, findings, facts, dropped)


def _dropped_lines(splits: Mapping[str, Lines], findings: list[Finding]) -> dict[str, Dropped]:
    """What data_policy drops for its content; a line with an error is rejected, not dropped."""
    return {
        split: {
            reason: numbers - _bad_lines(findings, lines.file)
            for reason, numbers in lines.dropped.items()
        }
        for split, lines in splits.items()
    }


def _sound_lines(
    splits: Mapping[str, Lines],
    findings: list[Finding],
    dropped: Mapping[str, Dropped],
    *,
    has_template: bool,
) -> dict[str, SoundLines]:
    """What is tokenised: lines that are sound and stay, of splits that there is a way for."""
    return {
        split: SoundLines(
            lines.source,
            frozenset(_bad_lines(findings, lines.file)).union(*dropped[split].values()),
        )
        for split, lines in splits.items()
        if lines.source is not None and (lines.format == "text" or has_template)
    }


def _judge_tokens(facts: TokenFacts, file: str, settings: DataSettings) -> Iterator[Finding]:
    frame = token_frame(facts, file, settings)
    yield from judge(TemplateErrors, problem_frame(facts, file), "error")
    yield from judge(TokenErrors, frame, "error")
    yield from judge(TokenWarnings, frame, "warning")


def _bad_lines(findings: list[Finding], file: str) -> set[int]:
    return {
        finding.line
        for finding in findings
        if finding.severity == "error" and finding.file == file and finding.line is not None
    }


def _make_report(
    settings: DataSettings,
    splits: Mapping[str, Lines],
    findings: list[Finding],
    facts: Mapping[str, TokenFacts],
    dropped: Mapping[str, Dropped],
) -> DatasetReport:
    counted: dict[str, SplitStats] = {}
    for split, lines in splits.items():
        if lines.source is not None:
            rejected = len(_bad_lines(findings, lines.file))
            counted[split] = count_split(
                lines.file, lines.frame, rejected, lines.digest, dropped[split]
            )
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
