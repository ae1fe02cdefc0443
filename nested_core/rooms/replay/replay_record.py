"""replay.json: which earlier examples a run mixes into its batches, and which it leaves out.

The examples are in replay.jsonl beside it, whose hash it holds: a run that goes on reads the two,
and no source again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from nested_core.errors import go_on_with, join_first_values, naming_damaged_file
from nested_core.records.start import CONFIGURED, Choice
from nested_core.storage.atomic import digest_json
from nested_core.storage.untrusted_files import UNBOUNDED, read_regular
from nested_core.text.digest_format import shorten_digest

MAX_NAMED_SOURCES = 3


class ReplaySource(BaseModel):
    """What a data set gave.

    version: the version that was trained on it; file: the file, for one that was named.
    examples: how many of its examples are replayed; digest: SHA-256 over the SHA-256 of each.
    rows: how many it has for training.
    repeated: those that newer data has too; superseded: those whose prompt has another answer
        there; held_out: those that equal a held-out example, of this run or of any source.
    problem: what is missing of it, or has changed; None for a whole one.
    """

    model_config = ConfigDict(frozen=True, strict=True)
    version: str | None = None
    file: str | None = None
    examples: int = 0
    digest: str = ""
    rows: int = 0
    repeated: int = 0
    superseded: int = 0
    held_out: int = 0
    problem: str | None = None

    @property
    def name(self) -> str:
        """What a person knows it by."""
        return self.file or f"version {shorten_digest(self.version or '')}"

    @property
    def fresh(self) -> int:
        """How many of its examples may be replayed."""
        return self.rows - self.repeated - self.superseded - self.held_out

    def describe(self) -> str:
        """Return how many of the source's examples are replayed, and why the others are not."""
        others = {
            "newer data has too": self.repeated,
            "superseded": self.superseded,
            "held out": self.held_out,
        }
        unused = self.fresh - self.examples
        left_out = [f"{count:,} {reason}" for reason, count in others.items() if count]
        left_out += [f"{unused:,} more than the run has room for"] if unused > 0 else []
        rest = f" ({', '.join(left_out)})" if left_out else ""
        return f"{self.examples:,} of {self.rows:,} examples of {self.name}{rest}"


class ReplayRecord(BaseModel):
    """The earlier examples of a run, with what they were chosen by.

    choice: whether the run goes on from the champion, and replays them, or is rebuilt, and trained
        on all of them as often as on its own.
    fraction: of the rows, where they are replayed; fraction_is_default: none was configured.
    weighting: how often older sources come.
    start: the champion whose lineage the sources are; None for files, and before the first.
    removed: the ancestor at which the known lineage ends, because it is not in the registry; None
        for a whole. removal_is_recorded: the history says that it was removed.
    sources: newest first.
    rows_sha256: of replay.jsonl, which has the examples of each source in turn.
    dropped: SHA-256 of the new training examples that equal a held-out example of a source, and are
        not trained on.
    rows_of_first: how many rows the lineage's first night had: a rebuilt night uses each of its
        rows as often as `iters` would use each of these.
    """

    model_config = ConfigDict(frozen=True, strict=True)
    choice: Choice
    fraction: float
    weighting: Literal["uniform", "recent"]
    start: str | None
    sources: tuple[ReplaySource, ...]
    rows_sha256: str
    dropped: tuple[str, ...] = ()
    fraction_is_default: bool = False
    removed: str | None = None
    removal_is_recorded: bool = True
    rows_of_first: float

    @property
    def is_rebuilt(self) -> bool:
        """Whether the run is trained from the base on all of them."""
        return self.choice.policy == "rebuild"

    @property
    def examples(self) -> int:
        """How many examples of earlier data the run is trained on."""
        return sum(source.examples for source in self.sources)

    @property
    def content_digest(self) -> str:
        """SHA-256 over what shapes the adapter: the examples, whatever sources they are from."""
        digests = [source.digest for source in self.sources if source.examples]
        return digest_json([self.choice.policy, digests, *self.dropped])

    def problems(self) -> list[str]:
        """A sentence for each source that is not whole."""
        return [f"{source.name}: {source.problem}" for source in self.sources if source.problem]

    def name_what_is_missing(self) -> str:
        """`; not all is there of version 1a2b3c4d`, for the reason of a choice; empty if all is."""
        names = [source.name for source in self.sources if source.problem]
        shown = join_first_values(names, MAX_NAMED_SOURCES)
        return f"; not all is there of {shown}" if names else ""

    def describe(self) -> Iterator[str]:
        """Yield sentences: what is replayed of each source, what is not, and what is missing."""
        listed = "; ".join(source.describe() for source in self.sources if source.rows)
        if self.choice != CONFIGURED:
            what = "rebuilding from the base" if self.is_rebuilt else "going on from the champion"
            yield f"{what}: {self.choice.reason}{self.choice.describe_seconds()}"
        if self.is_rebuilt and listed:
            yield f"rebuilding: beside the new rows, {listed}"
        elif self.is_rebuilt:
            yield "rebuilding: there is no earlier data"
        elif listed:
            default = " (the default)" if self.fraction_is_default else ""
            yield f"replay: {self.fraction:.3g} of the rows{default}, from {listed}"
        elif self.fraction:
            yield "replay: there is no earlier data to replay"
        if self.removed is not None:
            where = "was removed from the" if self.removal_is_recorded else "is not in this"
            yield (
                f"replay: version {shorten_digest(self.removed)} {where} registry: "
                f"what it and its ancestors were trained on is not replayed"
            )
        yield from (f"replay: {problem}" for problem in self.problems())


def read_replay(record: Path) -> ReplayRecord:
    """Read replay.json; DamagedError if it is no such record."""
    remedy = "The run wrote this file: bring it back, or start a new run."
    with naming_damaged_file(record, remedy, go_on_with()):
        return ReplayRecord.model_validate_json(read_regular(record, UNBOUNDED))
