"""What the page of a run says of the earlier examples that it is trained on."""

from __future__ import annotations

from collections.abc import Iterator

from nested_core.records.run_status import Run
from nested_core.report.page_blocks import PageBlocks
from nested_core.rooms.replay.replay_record import read_replay
from nested_core.text.document import Block, Table, Text


def describe_replay(run: Run) -> Iterator[Block]:
    """Yield sentences and tables on what is replayed of each earlier data set, and left out.

    Yields nothing for a run without replay.
    """
    replay = run.read(run.folder.replay, read_replay)
    if replay is None:
        return
    for sentence in replay.describe():
        yield Text(f"{sentence[0].upper()}{sentence[1:]}.")
    counts = ("examples", "rows", "repeated", "superseded", "held_out")
    rows = [(source.name, *(getattr(source, name) for name in counts)) for source in replay.sources]
    columns = ("data set", "replayed", "of", "newer data has too", "superseded", "held out")
    yield Table("Replayed examples, newest data set first; all: replay.jsonl", columns, rows)
    yield Table("Their digest", ("examples", "digest"), [(replay.examples, replay.content_digest)])


BLOCKS = PageBlocks(of_run=describe_replay)
