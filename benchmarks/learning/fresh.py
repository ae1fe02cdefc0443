"""Rows of a task that no study before PROTOCOL-4.md has trained on, chosen by or asked."""

from __future__ import annotations

import hashlib
from pathlib import Path

from benchmarks.learning.streams import read_stream
from benchmarks.learning.study import FULL, REAL, SMALL
from benchmarks.learning.tasks import READERS, Counts, Row, Splits, read_task

STREAMS = ("intents", "four")  # of real text
FROM_TRAINING_FILE = ("banking77", "snips")  # where the rows that may judge do not suffice


def read_fresh(name: str, data: Path | None, counts: Counts) -> Splits:
    """The splits of `read_task`, but for the rows that judge, by their prompt's SHA-256."""
    splits = read_task(name, data, counts)
    if name == "geography" or data is None:
        return splits
    pools = READERS[name](data)
    known = seen_prompts(name, data) | folded(splits.train) | folded(splits.choose)
    taken = dict[str, Row]()
    for pool in (pools[2], pools[0] if name in FROM_TRAINING_FILE else []):
        fresh = {row.prompt.casefold(): row for row in pool}
        order = sorted(fresh.keys() - known - taken.keys(), key=digest)
        taken |= {prompt: fresh[prompt] for prompt in order[: counts.judge - len(taken)]}
    return Splits(splits.train, splits.choose, tuple(taken.values()))


def seen_prompts(name: str, data: Path) -> set[str]:
    """The prompts of the task in earlier studies, and of all nights of real text, without case."""
    seen = set[str]()
    for study in (FULL, REAL, SMALL):
        if name in study.tasks:
            splits = read_task(name, data, study.counts)
            seen |= folded(splits.train) | folded(splits.choose) | folded(splits.judge)
    for stream in STREAMS:
        for night in read_stream(stream, data).nights:
            facts = (*night.train, *night.choose, *night.questions)
            seen |= folded([fact.row for fact in facts])
    return seen


def folded(rows: list[Row] | tuple[Row, ...]) -> set[str]:
    """The prompts of rows, without case."""
    return {row.prompt.casefold() for row in rows}


def digest(text: str) -> str:
    """Its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()
