"""Statistics of a split for the report: rows, roles, lengths in tokens, padding.

They become SplitStats, and findings of severity info.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl

from nested_core.data.batches import sort_into_buckets
from nested_core.data.data_settings import DataSettings
from nested_core.data.lines.example_parsing import CONVERSATION_FORMATS
from nested_core.data.rules.related_lines import Dropped
from nested_core.data.tokens.parallel_tokenization import TokenFacts
from nested_core.records.dataset import Finding, SplitStats, TokenStats
from nested_core.text.value_format import format_count

_LETTERS_OF_ROLES = {"system": "s", "user": "u", "assistant": "[ac]", "tool": "[to]", "other": "x"}


def make_split_stats(
    file: str, frame: pl.DataFrame, rejected: int, digest: str, dropped: Dropped
) -> SplitStats:
    """Count the lines of one split.

    digest: of the split's content.
    rejected: how many lines have an error. dropped: the lines that data_policy drops, by reason.
    """
    blank = int(frame["is_blank"].sum())
    formats = frame["file_format"].drop_nulls()
    return SplitStats(
        file=file,
        format=formats[0] if len(formats) else None,
        lines=frame.height,
        blank=blank,
        rejected=rejected,
        rows=frame.height - blank - rejected - sum(map(len, dropped.values())),
        roles=_count_roles(frame["roles"]),
        digest=digest,
        in_format=int((frame["format"] == frame["file_format"]).sum()),
        dropped={reason: tuple(sorted(lines)) for reason, lines in dropped.items()},
    )


def _count_roles(roles: pl.Series) -> dict[str, int]:
    """Count the turns of each role."""
    orders = roles.drop_nulls().value_counts()  # few: most conversations go alike
    letters_of = orders["roles"].cast(pl.String)
    counts = {
        role: int((letters_of.str.count_matches(letters) * orders["count"]).sum())
        for role, letters in _LETTERS_OF_ROLES.items()
    }
    return {role: count for role, count in counts.items() if count}


def make_token_stats(
    facts: TokenFacts, settings: DataSettings, context: int | None
) -> TokenStats | None:
    """Compute lengths after truncation and what was cut; None for a split without examples.

    context: the model's context length in tokens; None if unknown.
    """
    if not len(facts.examples):
        return None
    lengths = facts.examples["length"]
    lost = facts.examples["full_length"] - lengths
    buckets = sort_into_buckets(lengths, settings.batch_size, settings.max_seq_length)
    p50, p95 = np.percentile(lengths, (50, 95), method="inverted_cdf")
    return TokenStats(
        total=int(lengths.sum(dtype=np.int64)),
        p50=int(p50),
        p95=int(p95),
        max=int(lengths.max()),
        supervised=int(facts.examples["supervised"].sum(dtype=np.int64)),
        truncated_rows=int((lost > 0).sum()),
        lost_tokens=int(lost.sum(dtype=np.int64)),
        padding_share=buckets.padding_share,
        widths=len(buckets.widths),
        context=context,
        beyond_context=0 if context is None else int((lengths > context).sum()),
    )


def describe_split_stats(stats: SplitStats, batch_size: int) -> Iterator[Finding]:
    """Yield the counts as findings of severity info: rows, roles, tokens, padding, digest."""
    format_name = f"{stats.format} " if stats.format else ""
    facts = {"rows": f"{stats.rows:,} {format_name}rows in {format_count(stats.lines, 'line')}"}
    if stats.rejected:
        facts["rows"] += f", {stats.rejected:,} rejected"
    if gone := sum(map(len, stats.dropped.values())):
        facts["rows"] += f", {gone:,} dropped"
    if stats.format in CONVERSATION_FORMATS:
        facts["roles"] = ", ".join(f"{role} {count:,}" for role, count in stats.roles.items())
    if (tokens := stats.tokens) is not None:
        lengths = f"a row: median {tokens.p50:,}, p95 {tokens.p95:,}, longest {tokens.max:,}"
        share = tokens.supervised / max(tokens.total, 1)  # a template may write nothing
        facts["tokens"] = f"{tokens.total:,} in all; {lengths}"
        facts["supervised"] = f"{tokens.supervised:,} tokens, {share:.1%} of all"
        widths = "one width" if tokens.widths == 1 else f"{tokens.widths} widths"
        share = tokens.padding_share
        facts["padding"] = f"{share:.1%} of batches of {batch_size}, which have {widths}"
    facts["digest"] = stats.digest
    for check, message in facts.items():
        yield Finding(stats.file, None, "info", check, message)


def describe_earlier_answers(
    stats: SplitStats, turns: pl.Series, settings: DataSettings
) -> Iterator[Finding]:
    """Yield a warning if the loss counts the last answer of chats that have several.

    turns: the roles of each line, a letter a turn.
    """
    answers = turns.drop_nulls().cast(pl.String).str.count_matches(_LETTERS_OF_ROLES["assistant"])
    earlier = int((answers.cast(pl.Int64) - 1).clip(0).sum())
    if settings.supervised_targets == "last" and settings.loss is None and earlier:
        yield Finding(
            stats.file,
            None,
            "warning",
            "earlier-answers",
            f"{earlier:,} of {int(answers.sum()):,} answers are not trained on: those before the "
            "last one of their row. With training.supervise: all they are",
        )
