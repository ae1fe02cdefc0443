"""Check the tables of a data set's lines by the rules, and tokenize its valid lines.

It refuses nothing; the report says what is wrong. polars and pandera take a second to import; a
cached data set does not need this module, see dataset_loading.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl

from nested_core import seams
from nested_core.data.data_settings import DataSettings
from nested_core.data.lines.example_parsing import (
    TEMPLATED_FORMATS,
    UNTEMPLATED_FORMATS,
    formats_of_loss,
    read_examples,
)
from nested_core.data.parallel_jobs import OnProgress
from nested_core.data.room_checks import NearDuplicates, RowChecks
from nested_core.data.rules.file_rules import FILE_RULES, ROW_COUNT_RULES
from nested_core.data.rules.line_rules import LINE_RULES, make_held_out_rules
from nested_core.data.rules.related_lines import (
    add_begun_chats,
    add_dropped_lines,
    describe_dropped,
)
from nested_core.data.rules.split_statistics import (
    describe_earlier_answers,
    describe_split_stats,
    make_split_stats,
    make_token_stats,
)
from nested_core.data.rules.token_rules import (
    DOUBT_RULES,
    ENCODING_RULES,
    TOKEN_RULES,
    make_doubt_frame,
    make_encoding_problem_frame,
    make_token_frame,
)
from nested_core.data.split_table import SplitTable
from nested_core.data.tokens.parallel_tokenization import (
    LinesToTokenize,
    TokenFacts,
    tokenize_splits,
)
from nested_core.data.tokens.tokenized_split import draw_rows
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.models.base_model import (
    chat_template_digest,
    context_length,
    fingerprint_tokenizer,
    vocabulary_digest,
)
from nested_core.models.tokenizer_cell import try_to_load
from nested_core.records.dataset import DatasetReport, Findings, Severity, SplitStats, sort_findings
from nested_core.storage.atomic import digest_json

Tables = Mapping[str, SplitTable]
MAX_COMPARED, COMPARED_BYTES = 2_000, 4 * 2**20  # examples of a split without `training.loss`


def judge_dataset(
    settings: DataSettings,
    tables: Tables,
    on_progress: OnProgress | None,
    *,
    tokenizer: TokenizerSource | None = None,
    folder: Path | None = None,
) -> DatasetReport:
    """Check every line of a data set by the rules; return the report, which may have errors.

    tables: each split (train, valid, test) as a table with one row for each line of its file.
    tokenizer, folder: if both are given, the tokens of valid lines are written to the folder, and
        the rules about tokens are checked too. With a tokenizer the report also names the hashes of
        what the tokens depend on.
    """
    has_template = tokenizer is None or try_to_load(tokenizer.files)
    # Splits that were joined of several files: findings name the original file
    parts_by_file = {
        table.file: table.source.parts
        for table in tables.values()
        if table.source is not None and table.source.parts
    }
    findings = Findings(parts=parts_by_file)
    _apply_line_rules(tables, settings, findings)
    _apply_file_rules(tables, settings, findings, lacks_template=not has_template)
    _apply_rules_of_examples(tables, settings, findings)
    # A line that is rejected anyway is not counted as dropped by data_policy as well
    tables = _remove_rejected_from_dropped(tables, findings)
    facts: dict[str, TokenFacts] = {}
    context = None if tokenizer is None else context_length(Path(tokenizer.folder))
    if tokenizer is not None and folder is not None:
        usable = {  # lines that are neither rejected nor dropped, of splits that can be tokenised
            split: LinesToTokenize(
                table.source, findings.lines_with_errors(table.file).union(*table.dropped.values())
            )
            for split, table in tables.items()
            if table.source is not None and (table.format in UNTEMPLATED_FORMATS or has_template)
        }
        facts = tokenize_splits(folder, usable, settings, tokenizer, on_progress=on_progress)
        train = tables["train"]
        begun = add_begun_chats(facts, folder, partial(findings.find_place, train.file))
        if begun and settings.policy.leakage == "drop":
            dropped = {**train.dropped, "leakage": train.dropped["leakage"] | begun}
            tables["train"] = replace(train, dropped=dropped)
            return judge_dataset(settings, tables, on_progress, tokenizer=tokenizer, folder=folder)
    # The rules about tokens; lines with too many are dropped only here, where tokens are counted
    for split, split_facts in facts.items():
        file = tables[split].file
        ENCODING_RULES.add_findings(make_encoding_problem_frame(split_facts, file), findings)
        DOUBT_RULES.add_findings(make_doubt_frame(split_facts, file), findings)
        TOKEN_RULES.add_findings(make_token_frame(split_facts, file, settings, context), findings)
        if split_facts.overlong:
            dropped = {**tables[split].dropped, "overlong": split_facts.overlong}
            tables[split] = replace(tables[split], dropped=dropped)
    _apply_row_count_rules(tables, settings, findings)
    for table in tables.values():
        add_dropped_lines(table.file, table.dropped, findings)
    report = _make_report(settings, tables, findings, facts, context)
    if tokenizer is None:
        return report
    base = Path(tokenizer.folder)
    return replace(
        report,
        chat_template=chat_template_digest(base),
        vocabulary=vocabulary_digest(base),
        tokenizer=fingerprint_tokenizer(base),
    )


def _apply_line_rules(tables: Tables, settings: DataSettings, findings: Findings) -> None:
    """Add the findings of rules about single lines."""
    for table in tables.values():
        frame = table.frame
        if settings.policy.roles == "template":  # then no rule has roles to judge
            frame = frame.with_columns(roles=pl.lit(None, frame.schema["roles"]))
        LINE_RULES.add_findings(frame, findings)
        for part in seams.load_all(RowChecks):
            part.add_findings(frame, findings)
    # Nothing is dropped from a held-out set, so under `drop` there is only something to know.
    severity: Severity = "error" if settings.policy.leakage == "error" else "warning"
    make_held_out_rules(severity).add_findings(tables["test"].frame, findings)
    near_severity: Severity = "error" if settings.policy.near_duplicates == "error" else "warning"
    for near in seams.load_all(NearDuplicates):
        for table in tables.values():
            if "near" in table.frame.columns:
                near.add_findings(table.frame, findings, near_severity)


def _apply_file_rules(
    tables: Tables, settings: DataSettings, findings: Findings, *, lacks_template: bool
) -> None:
    """Add the findings of rules about a split as a whole, such as a missing file.

    lacks_template: the model's tokenizer has no chat template, which formats of turns need.
    """
    existing = [split for split, table in tables.items() if table.source is not None]
    folder, held = settings.describe_incomplete_folder(existing)
    # One row for each split; the columns are those that the rules name
    rows = [
        {
            "file": table.file,
            "line": None,  # the finding is about no single line
            "split": split,
            "folder": folder,
            "held": held,
            "columns": settings.column_flags,
            "is_present": table.source is not None,
            "format": table.format,
            "mask_prompt": settings.mask_prompt,
            "supervise": settings.supervise,
            "lacks_template": lacks_template and table.format in TEMPLATED_FORMATS,
        }
        for split, table in tables.items()
    ]
    frame = pl.DataFrame(rows, schema_overrides={"line": pl.Int32, "format": pl.String})
    FILE_RULES.add_findings(frame, findings)


def _apply_rules_of_examples(tables: Tables, settings: DataSettings, findings: Findings) -> None:
    """Add the findings of rooms on the valid examples of all splits, beside each other.

    Those are of a plugged-in loss (`training.loss`), about all rows that it trains on; without one,
    of RowChecks, about at most `MAX_COMPARED` rows of each split, drawn by chance: fewer if they
    are long, of about `COMPARED_BYTES`.
    """
    formats, parts = formats_of_loss(settings.loss), seams.load_all(RowChecks)
    rooms = formats.values() if settings.loss else parts
    judges = dict.fromkeys(one.judge for one in rooms if one.judge)  # formats may share one
    examples = {}
    for split, table in tables.items() if judges else ():
        if (source := table.source) is None:
            continue
        # Lines are counted in the converted file to read it, and in the original file to report
        left_out = findings.lines_with_errors(table.file).union(*table.dropped.values())
        is_usable = pl.col("format").is_in([*formats]) & ~pl.col("line").is_in([*left_out])
        lines = table.frame.filter(is_usable)["line"].to_numpy()
        fitting = len(lines) * COMPARED_BYTES // max(1, source.path.stat().st_size)
        most = len(lines) if settings.loss else min(MAX_COMPARED, len(lines), fitting)
        drawn = lines[draw_rows(len(lines), most)]
        wanted = source.physical_lines_of(set(drawn.tolist()))
        read = read_examples(source.path, settings.field_names, set(), only=wanted)
        examples[split] = {source.number_of(line): example for line, example in read}
    for found in (finding for judge in judges for finding in judge(examples)):
        file, line = tables[found.file].file, found.line
        if line is not None and found.severity == "error":
            findings.error_lines.setdefault(file, set()).add(line)
        if line is not None:
            file, line = findings.find_place(file, line)
        findings.listed.append(replace(found, file=file, line=line))


def _remove_rejected_from_dropped(tables: Tables, findings: Findings) -> dict[str, SplitTable]:
    """Return the tables without lines in `dropped` that have an error and so are rejected."""
    remaining = {}
    for split, table in tables.items():
        rejected = findings.lines_with_errors(table.file)
        dropped = {reason: lines - rejected for reason, lines in table.dropped.items()}
        remaining[split] = replace(table, dropped=dropped)
    return remaining


def _apply_row_count_rules(tables: Tables, settings: DataSettings, findings: Findings) -> None:
    """Add the findings about how many rows each split has left to use, such as none.

    Blank lines and lines that data_policy drops are not counted.
    """
    damaged = {finding.file for finding in findings.listed if finding.check == "damaged-file"}
    rows = [
        {
            "file": table.file,
            "line": None,
            "split": split,
            "lines": table.frame.height,
            "rows": int((~table.frame["is_blank"]).sum()) - sum(map(len, table.dropped.values())),
            "faulty": _describe_faulty_lines(len(findings.lines_with_errors(table.file))),
            "dropped": describe_dropped(table.dropped),
            "remedy": _EMPTY_FILE_REMEDIES[bool(table.dropped.get("overlong"))],
            "is_whole": damaged.isdisjoint(table.file_names),
            "has_one_answer": table.has_one_answer,
            "batch_size": settings.batch_size,
        }
        for split, table in tables.items()
        if table.source is not None
    ]
    schema = {"line": pl.Int32, **dict.fromkeys(("lines", "rows", "batch_size"), pl.Int64)}
    if rows:
        ROW_COUNT_RULES.add_findings(pl.DataFrame(rows, schema_overrides=schema), findings)


_EMPTY_FILE_REMEDIES = {
    False: "write one a line, or remove the file",
    True: "give shorter rows, or raise max_seq_length for a model that sees more tokens",
}


def _describe_faulty_lines(number: int) -> str:
    """Return ` (1 with an error)`, or "" without any; such lines will be rows once corrected."""
    return f" ({number:,} with an error)" if number else ""


def _make_report(
    settings: DataSettings,
    tables: Tables,
    findings: Findings,
    facts: Mapping[str, TokenFacts],
    context: int | None,
) -> DatasetReport:
    """Build the report from tables, findings and token facts.

    facts: what tokenizing found out, by split; empty if nothing was tokenized.
    context: the model's context length in tokens; None if unknown.

    The counts of each split are added to the findings, as findings of severity info.
    """
    splits: dict[str, SplitStats] = {}
    for split, table in tables.items():
        if table.source is None:
            continue
        rejected = len(findings.lines_with_errors(table.file))
        stats = make_split_stats(table.file, table.frame, rejected, table.digest, table.dropped)
        source = table.source
        stats = replace(
            stats, parts=source.parts, delimiters=source.delimiters, tags={**source.tags}
        )
        if split in facts:
            stats = replace(stats, tokens=make_token_stats(facts[split], settings, context))
        splits[split] = stats
        findings.listed.extend(describe_split_stats(stats, settings.batch_size))
        findings.listed.extend(describe_earlier_answers(stats, table.frame["roles"], settings))
    files = [name for table in tables.values() for name in table.file_names]
    train, is_chat = facts.get("train"), tables["train"].format not in UNTEMPLATED_FORMATS
    return DatasetReport(
        settings.describe_source,
        digest_json({split: stats.digest for split, stats in splits.items()}),
        splits,
        sort_findings(findings.listed, files),
        None if train is None else train.read_prompt_format(is_chat=is_chat),
    )
