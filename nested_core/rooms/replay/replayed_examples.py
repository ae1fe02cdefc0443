"""Which earlier examples a run replays: none that newer data repeats, contradicts or holds out.

Rows are compared as the validation compares duplicates: see `fold_text`. Of the
examples that are left, as many are chosen as the run has room for, by its seed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.data.data_settings import SPLITS, DataSettings, Targets
from nested_core.data.example_rows import RowKeys, read_split_rows
from nested_core.data.held_out_rows import as_test_set_alone
from nested_core.data.lines.example_parsing import ANY_ROLE, find_format, find_row_format
from nested_core.data.lines.line_rows import digest_with_beginnings, parse_row
from nested_core.rooms.replay.replay_record import ReplaySource

Row = Mapping[str, Any]
KeyedRow = tuple[Row, RowKeys]
LeftOut = Literal["held_out", "repeated", "superseded"]


def key_rows(rows: Iterable[Row]) -> list[KeyedRow]:
    """Return rows of `read_split_rows`, each with its keys, which take longer than all else."""
    return [(row, RowKeys.of(row)) for row in rows]


@dataclass
class NewerRows:
    """The rows of newer data, by their keys: what an earlier row is compared with.

    rows: of all rows; prompts: of all rows that have one; held_out: of rows that are held out.
    asked, digests: the last questions of rows that are held out, and digests of them.
    train: the training examples of the run itself, with their keys.
    splits: the digest of each split that was read, as dataset.json has it.
    targets: what the run learns of a chat: each answer, and so each beginning too, unless `last`.
        None for rows that are only compared, as the registry keeps them.
    """

    rows: set[bytes] = field(default_factory=set)
    prompts: set[bytes] = field(default_factory=set)
    held_out: set[bytes] = field(default_factory=set)
    asked: set[bytes] = field(default_factory=set)
    digests: set[int] = field(default_factory=set)
    train: Sequence[KeyedRow] = ()
    splits: dict[str, str] = field(default_factory=dict)
    targets: Targets | None = None

    def add(self, rows: Iterable[KeyedRow], *, are_held_out: bool) -> None:
        """Add rows of train, or rows that are held out."""
        for row, keys in rows:
            self.rows.add(keys.bare)
            self.prompts.update(keys.questions[-1:])
            if are_held_out:
                self.hold_out(row, keys)

    def hold_out(self, row: Row, keys: RowKeys) -> None:
        """Count a row as held out."""
        self.held_out.add(keys.bare)
        if self.targets is not None:
            self.asked.update(keys.questions[-1:])
            self.digests.update(digest_with_beginnings(parse_row(row))[:1])

    def is_held_out(self, row: Row, keys: RowKeys) -> bool:
        """Return whether a row, or a beginning of it that the run would learn, is held out."""
        if keys.bare in self.held_out:
            return True
        if self.asked.isdisjoint(keys.questions):  # then no digest needs to be computed
            return False
        digests = digest_with_beginnings(parse_row(row))
        return not self.digests.isdisjoint(digests[:1] if self.targets == "last" else digests)

    def find_reason(self, row: Row, keys: RowKeys) -> LeftOut | None:
        """Return why newer data makes an earlier row be left out; None if it does not.

        The reasons are `held_out` (newer data holds the row or what it begins with out), `repeated`
        (newer data trains on it) and `superseded` (newer data has another answer to its prompt, or,
        for a rated answer or a preference, the opposite rating).
        """
        if self.is_held_out(row, keys):
            return "held_out"
        if keys.bare in self.rows:
            return "repeated"
        opposite = _find_opposite_row(row)
        if opposite is None:
            return None if self.prompts.isdisjoint(keys.questions[-1:]) else "superseded"
        return "superseded" if RowKeys.of(opposite).bare in self.rows else None


def read_new_data(config: FineTuneConfig, *, held_out_is_judged: bool = False) -> NewerRows:
    """Read the run's own data, with the file `gate.held_out_file` if there is one.

    held_out_is_judged: count as held out only the rows that the gate judges by; else those of valid
        and test.
    """
    settings, judging = DataSettings.from_config(config), list[KeyedRow]()
    new = NewerRows(targets=None if held_out_is_judged else settings.supervised_targets)
    for split in SPLITS:
        split_rows = read_split_rows(settings, split)
        rows = [] if split_rows is None else key_rows(split_rows.rows)
        new.splits |= {} if split_rows is None else {split: split_rows.digest}
        new.add(rows, are_held_out=split != "train" and not held_out_is_judged)
        if split == "train" and not held_out_is_judged:
            new.train = rows
        if rows and split in SPLITS_BY_HELD_OUT_CHOICE.get(config.gate.held_out, ()):
            judging = rows  # of test if it has rows, since it comes last; else of valid
    new.add([*judging, *key_rows(read_held_out_file(config))], are_held_out=True)
    return new


def read_held_out_file(config: FineTuneConfig) -> Sequence[Row]:
    """The rows of the file that `gate.held_out` names; none if it names a split, or is gone."""
    path = Path(config.gate.held_out)
    if config.gate.held_out in SPLITS_BY_HELD_OUT_CHOICE or not path.is_file():
        return []
    with as_test_set_alone(path, DataSettings.from_config(config)) as alone:
        own = read_split_rows(alone, "test")
    return [] if own is None else own.rows


@dataclass(frozen=True)
class EarlierData:
    """A data set of an earlier night: its rows, or why it has no rows.

    source: what it is called, and what is missing of it, before its rows are counted.
    train: what may be replayed; held_out: its valid and test sets, and the file of the gate.
    """

    source: ReplaySource
    train: Sequence[Row] = ()
    held_out: Sequence[Row] = ()


@dataclass(frozen=True)
class SourceExamples:
    """The examples of a source that a run may be trained on, by their digests, and the others.

    source: counts the others, by reason.
    fresh: of each example the content, by which it is known, and its line of JSON.
    """

    source: ReplaySource
    fresh: Sequence[tuple[bytes, bytes]]

    def choose(self, rows: Iterable[int]) -> tuple[ReplaySource, list[bytes]]:
        """Return the source with the examples of these numbers, and their lines."""
        chosen = [self.fresh[row] for row in rows]
        digest = sha256(b"".join(content for content, _ in chosen)).hexdigest()
        source = self.source.model_copy(update={"examples": len(chosen), "digest": digest})
        return source, [line for _, line in chosen]


def sort_out_examples(
    new: NewerRows, earlier: Sequence[EarlierData], *, max_generations: int | None
) -> tuple[list[SourceExamples], list[bytes]]:
    """Return the earlier examples that a run may be trained on, and what it must not train on.

    The latter are the contents of new training examples that a source holds out, folded alike.

    Args:
        new: the data of the run, to which the earlier rows are added.
        earlier: all sources, the newest first; a row that any of them holds out is not trained on.
        max_generations: the number of sources that are used, the newest ones; None uses all.
    """
    held_out = [key_rows(data.held_out) for data in earlier]
    before = NewerRows(targets=new.targets)
    for row, keys in chain(*held_out):
        before.hold_out(row, keys)
    dropped = sorted({keys.content for row, keys in new.train if before.is_held_out(row, keys)})
    new.held_out |= before.held_out
    new.asked |= before.asked
    new.digests |= before.digests
    sources: list[SourceExamples] = []
    for age, data in enumerate(earlier):
        is_replayed = max_generations is None or age < max_generations
        train = key_rows(data.train if is_replayed else ())
        sources.append(_sort_out(data, train, new))
        new.add(train, are_held_out=False)
        new.add(held_out[age], are_held_out=True)
    return sources, dropped


def _sort_out(data: EarlierData, train: Sequence[KeyedRow], newer: NewerRows) -> SourceExamples:
    """Separate a source's rows into those that may be replayed and those that are left out."""
    counts = Counter[str]()
    fresh: dict[bytes, tuple[bytes, bytes]] = {}
    for row, keys in train:
        reason: LeftOut | None = (
            "repeated" if keys.folded in fresh else newer.find_reason(row, keys)
        )
        if reason is None:
            fresh[keys.folded] = keys.content, json.dumps(row, allow_nan=False).encode() + b"\n"
        else:
            counts[reason] += 1
    source = data.source.model_copy(update={"rows": len(train), **counts})
    return SourceExamples(source, sorted(fresh.values()))


def _find_opposite_row(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the one row that contradicts a row of `read_split_rows`: of a pair the swapped pair.

    None for rows of answers to learn, which any other answer to their prompt contradicts.
    """
    name = find_format(row, ANY_ROLE)
    contradict = None if name is None else find_row_format(name).contradict
    return None if contradict is None else contradict(row)
