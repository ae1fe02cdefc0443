"""A random split of a data set that has only train: rows for valid and for test are taken out.

Rows that ask one question go to one split together, and so do rows that nearly are one another: a
held-out row whose question is in train measures nothing. Where answers are a few labels, each split
has each of them about as often as all rows have.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from nested_core import seams
from nested_core.data.lines.example_parsing import ANY_LOSS, FieldNames, parse_line
from nested_core.data.lines.json_decoding import LineProblem
from nested_core.data.lines.line_rows import fold_questions, fold_text
from nested_core.data.room_checks import NearDuplicates
from nested_core.errors import ConfigError
from nested_core.rooms.tables.labels import find_labels
from nested_core.storage.untrusted_files import collect_strings
from nested_core.text.value_format import format_count

SPLIT_SEED = 0
DEFAULT_SHARE = 0.1  # of the rows, for valid and as much for test
MAX_TEST_SHARE = 0.3  # that an eval set may ask for


class TooManyQuestions(ConfigError):
    """More questions for an eval set than the rows can give."""

    def __init__(self, asked: int, most: int, rows: str) -> None:
        expected = f"expected from 1 to {most} questions" if most else "none can be drawn"
        super().__init__(f"--suite {asked}: {expected}, for {rows}.")


def read_share(given: str) -> float:
    """Return the share; ConfigError if it leaves nothing to train on, or takes nothing out."""
    with suppress(ValueError):
        if 0 < (share := float(given)) < 0.5:
            return share
    raise ConfigError(
        f"--split {given}: expected a share of the rows above 0 and below 0.5, such as 0.1, which "
        f"is taken for valid and as much again for test."
    )


@dataclass(frozen=True)
class SplitRequest:
    """How rows are to be split.

    share: of the rows, for valid and as much for test: at least one row each.
    questions: how many different ones test is to have at least; None leaves that to the answers,
        and 0 is for no eval set.
    trained: questions that are known already: rows that ask them go to train.
    names: where rows hold their fields.
    """

    share: float = DEFAULT_SHARE
    questions: int | None = None
    trained: Set[bytes] = frozenset()
    names: FieldNames = FieldNames()


@dataclass(frozen=True)
class DrawnSplits:
    """The lines of train, valid and test, and how many rows are in train for their question.

    has_near_duplicates: near-duplicates could not be kept together; too few rows would be left.
    """

    lines: dict[str, list[bytes]]
    known: int
    has_near_duplicates: bool

    def describe(self) -> list[str]:
        """Return what a person should know of the split, a sentence each."""
        rows = format_count(self.known, "row")
        told = {
            f"asked in the champion's data too: {rows}, all in train": self.known > 0,
            "warning: so many rows nearly are one another that some held-out ones nearly are rows "
            "of train; `nested-tune validate` names them": self.has_near_duplicates,
        }
        return [text for text, is_told in told.items() if is_told]


def draw_splits(rows: Sequence[bytes], request: SplitRequest) -> DrawnSplits | None:
    """Draw the lines of train, valid and test with a fixed seed: same rows, same splits.

    Sizes are shares of the rows that ask what is not known. Where those are too few to be split,
    all rows are in train, or None is returned where nothing is known. Raises TooManyQuestions
    where test would need more than MAX_TEST_SHARE of the questions, or none is new.
    """
    texts = [RowTexts.of(row, request.names) for row in rows]
    known = {row for row, one in enumerate(texts) if one.question in request.trained}
    together = _group_by_question(texts)
    new = [one for row, one in enumerate(texts) if row not in known]
    distinct = len({one.question for one in new})
    most = min(distinct, max(1, int(MAX_TEST_SHARE * distinct)))
    least = request.questions or 1
    if request.questions and not 0 < least <= most:
        share = f"{MAX_TEST_SHARE:.0%} of {distinct:,} questions are held out for it at most"
        no_new = "no question is new: the champion's data asks them all"
        raise TooManyQuestions(least, most, share if distinct else no_new)
    wanted = max(1, round(request.share * len(new)))
    sizes = {"valid": wanted, "test": max(wanted, math.ceil(least * len(new) / max(1, distinct)))}
    draw = _Draw(texts, sizes, least, known)
    parts = draw.split(_join([*together, *_pair_near_duplicates(texts)], len(rows)))
    is_too_coarse = any(not size <= len(parts[name]) <= 2 * size for name, size in sizes.items())
    if is_too_coarse:
        parts = draw.split(_join(together, len(rows)))
    if any(known.issuperset(part) for part in parts.values()):  # a split without a new row
        return DrawnSplits({"train": [*rows]}, len(known), False) if known else None
    lines = {name: [rows[row] for row in part] for name, part in parts.items()}
    return DrawnSplits(lines, len(known), is_too_coarse)


@dataclass(frozen=True)
class RowTexts:
    """What rows are compared by, without system texts.

    asked: the row's questions, see `fold_questions`.
    prompt, answer: the turns before the last answer, and that answer, as they are written.
    whole: all texts of the row.
    """

    asked: Sequence[bytes]
    prompt: str
    answer: str
    whole: str

    @cached_property
    def question(self) -> bytes:
        """The last question, or else the whole text, without case and white space."""
        return self.asked[-1] if self.asked else fold_text(self.whole.encode())

    @classmethod
    def of(cls, line: bytes, names: FieldNames) -> RowTexts:
        """Read a line; one that is no example is one text."""
        try:
            example = parse_line(line, replace(names, loss=ANY_LOSS, allows_any_role=True))
        except LineProblem:  # which the report on the new folder tells
            return cls((), "", "", line.decode(errors="replace"))
        turns = [turn for turn in example.messages if turn["role"] != "system"]
        texts = [turn.get("content") or json.dumps(turn.get("tool_calls")) for turn in turns]
        ends = [end for end, turn in enumerate(turns) if end and turn["role"] == "assistant"]
        return cls(
            fold_questions(example.messages),
            "\n".join(texts[: ends[-1]]) if ends else "",
            texts[-1] if ends else "",
            "\n".join([example.text, *texts, *collect_strings(dict(example.rest))]),
        )


def _group_by_question(texts: Sequence[RowTexts]) -> list[list[int]]:
    """Group rows that ask one question, with the chats in which it is asked on the way.

    Rows without a question are together where they are equal.
    """
    groups: dict[bytes, list[int]] = {}
    for row, one in enumerate(texts):
        groups.setdefault(one.question, []).append(row)
    for row, one in enumerate(texts):
        for earlier in one.asked[:-1]:
            if earlier in groups:
                groups[earlier].append(row)
    return [*groups.values()]


def _pair_near_duplicates(texts: Sequence[RowTexts]) -> list[Sequence[int]]:
    """Pair rows that nearly are one another, and rows whose questions nearly are."""
    compared = ([one.whole for one in texts], [one.prompt for one in texts])
    return [
        pair
        for near in seams.load_all(NearDuplicates)
        for column in compared
        for pair in near.pair(column)
    ]


def _join(groups: Iterable[Sequence[int]], count: int) -> list[list[int]]:
    """Return the numbers below `count`, in one list where groups have them together."""
    group_of = [[number] for number in range(count)]
    for group in groups:
        for number in group[1:]:
            joined, other = group_of[group[0]], group_of[number]
            if joined is other:
                continue
            if len(joined) < len(other):
                joined, other = other, joined
            joined += other
            for moved in other:
                group_of[moved] = joined
    return [*{id(group): sorted(group) for group in group_of}.values()]


@dataclass(frozen=True)
class _Draw:
    """Draws groups of rows for the splits.

    sizes: how many rows valid and test are to have. They have more where no group is small enough.
    questions: how many different ones test is to have.
    trained: rows that are in train whatever is drawn.
    """

    texts: Sequence[RowTexts]
    sizes: Mapping[str, int]
    questions: int
    trained: Set[int]

    def split(self, groups: Iterable[list[int]]) -> dict[str, list[int]]:
        """Return the rows of train, valid and test, each group in one of them."""
        every = [*groups]
        kept = [group for group in every if not self.trained.isdisjoint(group)]
        left = [group for group in every if self.trained.isdisjoint(group)]
        random.Random(SPLIT_SEED).shuffle(left)
        left = self._spread_labels(left)
        parts: dict[str, list[int]] = {"train": []}
        for split, size in self.sizes.items():
            taken: list[int] = []
            too_large = []
            for group in reversed(left):
                if len(taken) + len(group) > size:
                    too_large.append(group)
                else:
                    taken += group
            left = too_large[::-1]
            least = self.questions if split == "test" else 1
            while left and (
                len(taken) < size or len({self.texts[row].question for row in taken}) < least
            ):
                taken += left.pop(min(range(len(left)), key=lambda index: len(left[index])))
            parts[split] = taken
        parts["train"] = [row for group in [*kept, *left] for row in group]
        return parts

    def _spread_labels(self, groups: list[list[int]]) -> list[list[int]]:
        """Order the groups so that each stretch has each label about as often as all have.

        As they come where the answers are no labels. One that is rare stands in the middle, and so
        is trained on.
        """
        answers = [self.texts[group[0]].answer for group in groups]
        counts = Counter(answers)
        if "" in counts or not find_labels(counts):
            return groups
        seen: Counter[str] = Counter()
        places = []
        for answer in answers:
            places.append((seen[answer] + 0.5) / counts[answer])
            seen[answer] += 1
        return [groups[number] for number in sorted(range(len(groups)), key=places.__getitem__)]
