"""What rooms add to pages about runs and data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nested_core import seams

if TYPE_CHECKING:
    from nested_core.data.data_settings import DataSettings
    from nested_core.records.run_status import Run
    from nested_core.text.document import Block

GivenAnswer = tuple[str, str | None, str, float]  # model, expected answer, answer, score


@dataclass(frozen=True)
class PageBlocks:
    """What a room shows on pages and in the terminal; nothing where it gives no function.

    of_run: returns blocks on the data of a run.
    of_answers: returns blocks on the answers to an eval set, of its name and of each answer.
    of_data_set: returns blocks on a data set, for `validate`.
    of_rows: returns blocks on the rows that the verdict on a run warns of, at most so many of each
        kind.
    """

    of_run: Callable[[Run], Iterable[Block]] = lambda *_: ()
    of_answers: Callable[[str, Sequence[GivenAnswer]], Iterable[Block]] = lambda *_: ()
    of_data_set: Callable[[DataSettings], Iterable[Block]] = lambda *_: ()
    of_rows: Callable[[Run, int], Iterable[Block]] = lambda *_: ()


def show_answers(name: str, answers: Sequence[GivenAnswer]) -> Iterator[Block]:
    """Yield what rooms show of the answers to the eval set of this name."""
    for room in seams.load_all(PageBlocks):
        yield from room.of_answers(name, answers)


def show_data_set(settings: DataSettings) -> Iterator[Block]:
    """Yield what rooms show of a data set."""
    for room in seams.load_all(PageBlocks):
        yield from room.of_data_set(settings)


def show_rows(run: Run, most: int) -> Iterator[Block]:
    """Yield what rooms show of the rows that the verdict warns of, at most so many of each kind."""
    for room in seams.load_all(PageBlocks):
        yield from room.of_rows(run, most)
