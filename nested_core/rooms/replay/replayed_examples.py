"""Which earlier examples a run replays: none that newer data repeats, corrects or holds out.

Rows are compared as the validation compares duplicates: without case and white space. Of the
examples that are left, as many are chosen as the run has room for, by its seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.data.data_settings import SPLITS, DataSettings
from nested_core.data.example_rows import RowKeys, read_split_rows
from nested_core.data.held_out_rows import as_test_set_alone
from nested_core.rooms.replay.replay_draws import Weighting, choose_rows
from nested_core.rooms.replay.replay_record import (
    MAX_NAMED_PROMPTS,
    MAX_SHOWN_CHARACTERS,
    ReplaySource,
    SupersededRow,
)

Row = Mapping[str, Any]
Int64 = npt.NDArray[np.int64]
# Of contents of rows, the age of each row's source (0 is the newest) and the rows a source has:
# which rows, by number, ascending.
Select = Callable[[Sequence[bytes], Int64, Sequence[int]], Int64]


@dataclass
class NewData:
    """The data that a run is to be trained on, as far as earlier rows are compared with it.

    rows: how many training examples it has; train: their contents, each with the same folded;
    held_out: the contents of what it is evaluated by, folded.
    """

    rows: int = 0
    train: dict[bytes, bytes] = field(default_factory=dict)
    folded: set[bytes] = field(default_factory=set)
    prompts: set[bytes] = field(default_factory=set)
    held_out: set[bytes] = field(default_factory=set)

    def add(self, row: Row, *, is_held_out: bool) -> None:
        """Add a row of train, or one that is held out."""
        keys = RowKeys.of(row)
        self.folded.add(keys.folded)
        if keys.prompt is not None:
            self.prompts.add(keys.prompt)
        if is_held_out:
            self.held_out.add(keys.folded)
        else:
            self.rows += 1
            self.train[keys.content] = keys.folded


def read_new_data(config: FineTuneConfig) -> NewData:
    """The run's own data, and the file that the gate judges by."""
    settings = DataSettings.from_config(config)
    new = NewData()
    for split in SPLITS:
        own = read_split_rows(settings, split)
        for row in own.rows if own is not None else ():
            new.add(row, is_held_out=split != "train")
    for other in read_held_out_file(config):
        new.add(other, is_held_out=True)
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

    version, file, problem: as `ReplaySource` has them.
    train: what may be replayed; held_out: its valid and test sets, and the file of the gate.
    """

    version: str | None
    file: str | None
    train: Sequence[Row] = ()
    held_out: Sequence[Row] = ()
    problem: str | None = None


@dataclass(frozen=True)
class ChosenExamples:
    """What is replayed.

    lines: an example each, as JSON; those of each source in turn.
    dropped: the contents of new training examples that a source holds out, folded alike.
    """

    sources: tuple[ReplaySource, ...]
    lines: tuple[bytes, ...]
    dropped: tuple[bytes, ...]


def select_for_draws(draws: int, weighting: Weighting, seed: int) -> Select:
    """As many as a run has room for that mixes in so many rows, a row counted each time."""

    def select(contents: Sequence[bytes], ages: Int64, sizes: Sequence[int]) -> Int64:
        """By the draws of `choose_rows`."""
        return choose_rows(ages, sizes, draws, weighting, seed)

    return select


def select_all(contents: Sequence[bytes], ages: Int64, sizes: Sequence[int]) -> Int64:
    """All rows: what a rebuilt run is trained on."""
    return np.arange(len(contents), dtype=np.int64)


def choose_replayed_examples(
    new: NewData,
    earlier: Sequence[EarlierData],
    *,
    select: Select,
    max_generations: int | None,
) -> ChosenExamples:
    """Choose what a run is trained on of earlier data, newest first, and say what is not.

    Args:
        new: the data of the run.
        earlier: all sources; what any of them holds out is not trained on, whatever its age.
        select: which of the rows that may be trained on are.
        max_generations: how many of the newest sources are used; None is all.
    """
    held_out = {RowKeys.of(row).folded for data in earlier for row in data.held_out}
    dropped = sorted(content for content, folded in new.train.items() if folded in held_out)
    known = _Known(new.folded, new.prompts, new.held_out | held_out)
    sources: list[ReplaySource] = []
    candidates: list[list[tuple[bytes, bytes]]] = []
    for age, data in enumerate(earlier):
        is_replayed = max_generations is None or age < max_generations
        source, fresh = known.sort_out(data, data.train if is_replayed else ())
        sources.append(source)
        candidates.append(sorted(fresh))
    sizes = [len(own) for own in candidates]
    ages = np.repeat(np.arange(len(sizes)), sizes)
    rows = [row for own in candidates for row in own]
    places = select([content for content, _ in rows], ages, sizes)
    chosen = [[rows[n] for n in places[ages[places] == age]] for age in range(len(sizes))]
    return ChosenExamples(
        tuple(
            source.model_copy(
                update={
                    "examples": len(own),
                    "digest": sha256(b"".join(content for content, _ in own)).hexdigest(),
                }
            )
            for source, own in zip(sources, chosen, strict=True)
        ),
        tuple(line for own in chosen for _, line in own),
        tuple(dropped),
    )


@dataclass
class _Known:
    """What newer data has, which grows from source to source."""

    folded: set[bytes]
    prompts: set[bytes]
    held_out: set[bytes]

    def sort_out(
        self, data: EarlierData, train: Sequence[Row]
    ) -> tuple[ReplaySource, list[tuple[bytes, bytes]]]:
        """A source's counts, and content and line of each example that may be replayed.

        Its rows count as newer data for the sources after it.
        """
        repeated = superseded = held = 0
        named: list[SupersededRow] = []
        fresh: dict[bytes, tuple[bytes, bytes]] = {}
        prompts: set[bytes] = set()
        for row in train:
            keys = RowKeys.of(row)
            if keys.prompt is not None:
                prompts.add(keys.prompt)
            if keys.folded in self.held_out:
                held += 1
            elif keys.folded in self.folded or keys.folded in fresh:
                repeated += 1
            elif keys.prompt in self.prompts:
                superseded += 1
                if len(named) < MAX_NAMED_PROMPTS:
                    prompt = _shown_prompt(row)
                    named.append(SupersededRow(digest=keys.content.hex(), prompt=prompt))
            else:
                fresh[keys.folded] = keys.content, json.dumps(row, allow_nan=False).encode() + b"\n"
        for row in data.held_out:
            keys = RowKeys.of(row)
            self.folded.add(keys.folded)
            if keys.prompt is not None:
                prompts.add(keys.prompt)
        self.folded |= fresh.keys()
        self.prompts |= prompts
        source = ReplaySource(
            version=data.version,
            file=data.file,
            rows=len(train),
            repeated=repeated,
            superseded=superseded,
            held_out=held,
            named=tuple(named),
            problem=data.problem,
        )
        return source, list(fresh.values())


def _shown_prompt(row: Row) -> str:
    """The beginning of the last turn before the answer."""
    turns = row.get("messages") or [{"content": row.get("prompt")}, {}]
    text = str(turns[-2].get("content") or "") if len(turns) > 1 else ""
    return " ".join(text.split())[:MAX_SHOWN_CHARACTERS]
