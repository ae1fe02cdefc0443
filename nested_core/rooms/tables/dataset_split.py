"""A random split of a data set that has only train: rows for valid and for test are taken out.

Rows that ask one question go to one split together, and so do rows that nearly are one another: a
held-out row whose question is in train measures nothing. Where answers are a few labels, each split
has each of them about as often as all rows have.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from operator import itemgetter

from nested_core import seams
from nested_core.data.lines.example_parsing import ANY_LOSS, FieldNames, parse_line
from nested_core.data.lines.json_decoding import LineProblem
from nested_core.data.lines.line_rows import fold_questions, fold_text
from nested_core.data.room_checks import NearDuplicates
from nested_core.errors import ConfigError
from nested_core.rooms.tables.labels import find_labels
from nested_core.storage.untrusted_files import collect_strings
from nested_core.text.groups import grouped
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
    """Return the number of --split; ConfigError unless it is above 0 and below 0.5."""
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

    share: the share of the rows for valid, and as much for test: at least one row each.
    questions: the least number of different questions that test must have, for an eval set. None
        leaves that to the answers, and 0 means no eval set.
    trained: the questions of the champion's data: rows that ask them go to train.
    names: where rows hold their fields.
    values: of rows that belong together, such as those of one article, what they share.
    """

    share: float = DEFAULT_SHARE
    questions: int | None = None
    trained: Set[bytes] = frozenset()
    names: FieldNames = FieldNames()
    values: Mapping[bytes, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DrawnSplits:
    """The splits that were drawn.

    lines: the lines of train, valid and test.
    known: the number of rows that are in train because the champion's data has their question.
    has_near_duplicates: whether near-duplicates are in different splits: groups of them were too
        large to be held out whole.
    sizes: how many rows valid and test were to have, if whole groups cannot meet that.
    """

    lines: dict[str, list[bytes]]
    known: int
    has_near_duplicates: bool
    sizes: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """Return what a person should know of the split, a sentence each."""
        rows = format_count(self.known, "row")
        sentences = {
            f"asked in the champion's data too: {rows}, all in train": self.known > 0,
            "warning: so many rows nearly are one another that some held-out ones nearly are rows "
            "of train; `nested-tune validate` names them": self.has_near_duplicates,
        }
        for name, size in self.sizes.items():
            rows = format_count(len(self.lines[name]), "row")
            told = f"warning: {name} has {rows}, {size:,} were asked for: groups are held out whole"
            sentences[told] = len(self.lines[name]) != size
        return [sentence for sentence, applies in sentences.items() if applies]


def draw_splits(rows: Sequence[bytes], request: SplitRequest) -> DrawnSplits | None:
    """Draw the lines of train, valid and test, with a fixed seed: same rows, same splits.

    A row whose question the champion's data has is known and goes to train; the sizes of valid and
    test are shares of the other rows, the new ones. Rows with the same question or value, and if
    possible near-duplicates, are kept in one split.

    Where groups of one value are too large for the shares, the smallest are held out.

    If there are too few new rows to split, all rows go to train; without known rows, which would
    be judged by nothing, None is returned. Raises TooManyQuestions if the eval set would need more
    than MAX_TEST_SHARE of the questions, or there is no new one.
    """
    texts = [RowTexts.of(row, request.names) for row in rows]
    known = {row for row, one in enumerate(texts) if one.question in request.trained}
    valued = ((request.values.get(line), row) for row, line in enumerate(rows))
    groups = grouped((value, row) for value, row in valued if value)
    together = [*_group_by_question(texts), *groups.values()]
    new = [one for row, one in enumerate(texts) if row not in known]
    distinct = len({one.question for one in new})
    max_questions = min(distinct, max(1, int(MAX_TEST_SHARE * distinct)))
    questions = request.questions or 1
    if request.questions and not 0 < questions <= max_questions:
        share = f"{MAX_TEST_SHARE:.0%} of {distinct:,} questions are held out for it at most"
        no_new = "no question is new: the champion's data asks them all"
        raise TooManyQuestions(questions, max_questions, share if distinct else no_new)
    size = max(1, round(request.share * len(new)))
    sizes = {"valid": size, "test": max(size, math.ceil(questions * len(new) / max(1, distinct)))}
    draw = _Draw(texts, sizes, questions, known)
    near = [*_pair_near_duplicates(texts)]
    parts = draw.split(_join_groups([*together, *near], len(rows)))
    if any(not size <= len(parts[name]) <= 2 * size for name, size in sizes.items()):
        parts = draw.split(_join_groups(together, len(rows)))
    has_large = bool(groups) and any(not n <= len(parts[one]) <= 2 * n for one, n in sizes.items())
    if has_large:
        parts = draw.take_smallest(_join_groups(together, len(rows)))
    if any(known.issuperset(part) for part in parts.values()):  # a split without a new row
        return DrawnSplits({"train": [*rows]}, len(known), False) if known else None
    lines = {name: [rows[row] for row in part] for name, part in parts.items()}
    places = {row: name for name, part in parts.items() for row in part}
    has_near_duplicates = any(len({places[row] for row in rows_alike}) > 1 for rows_alike in near)
    return DrawnSplits(lines, len(known), has_near_duplicates, sizes if has_large else {})


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
        """Return the texts of a row; of a line that is no example, the line as one text."""
        try:
            example = parse_line(line, replace(names, loss=ANY_LOSS, allows_any_role=True))
        except LineProblem:  # the report on the new folder will tell it
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
    """Return groups of rows, by index, that ask the same question.

    The question of a chat is its last one; a chat that asks another row's question earlier is in
    that row's group too. Rows without a question are in one group if they are equal.
    """
    groups = grouped((one.question, row) for row, one in enumerate(texts))
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


def _join_groups(groups: Iterable[Sequence[int]], count: int) -> list[list[int]]:
    """Return all numbers below `count` in groups: numbers that share a group are in one.

    For example, with groups [0, 1] and [1, 3] and a count of 4: [[0, 1, 3], [2]].
    """
    group_of = [[number] for number in range(count)]
    for group in groups:
        for number in group[1:]:
            smaller, larger = sorted((group_of[group[0]], group_of[number]), key=len)
            if smaller is not larger:
                larger += smaller
                for moved in smaller:
                    group_of[moved] = larger
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
        """Return the indices of the rows of train, valid and test; no group is divided.

        Groups that fit are taken in a random order, in which labels are spread evenly.
        """
        every = [*groups]
        to_train = [group for group in every if not self.trained.isdisjoint(group)]
        remaining = [group for group in every if self.trained.isdisjoint(group)]
        random.Random(SPLIT_SEED).shuffle(remaining)
        remaining = self._spread_labels(remaining)
        parts: dict[str, list[int]] = {"train": []}
        for split, size in self.sizes.items():
            taken: list[int] = []
            too_large = []
            for group in reversed(remaining):
                if len(taken) + len(group) > size:
                    too_large.append(group)
                else:
                    taken += group
            remaining = too_large[::-1]
            needed = self.questions if split == "test" else 1
            # What is still missing is taken from the smallest of the groups that are too large
            while remaining and (
                len(taken) < size or len({self.texts[row].question for row in taken}) < needed
            ):
                lengths = [*map(len, remaining)]
                taken += remaining.pop(lengths.index(min(lengths)))
            parts[split] = taken
        parts["train"] = [row for group in [*to_train, *remaining] for row in group]
        return parts

    def take_smallest(self, groups: Iterable[list[int]]) -> dict[str, list[int]]:
        """Return the rows of train, valid and test where groups are too large for the sizes.

        Valid and test take small groups in turn, none above its size unless it would be empty.
        """
        parts: dict[str, list[int]] = {name: [] for name in ("train", *self.sizes)}
        for group in sorted(groups, key=len):
            name = min(self.sizes, key=lambda one: len(parts[one]) - self.sizes[one])
            fits = not parts[name] or len(parts[name]) + len(group) <= self.sizes[name]
            parts[name if fits and self.trained.isdisjoint(group) else "train"] += group
        return parts

    def _spread_labels(self, groups: list[list[int]]) -> list[list[int]]:
        """Return the groups in an order in which the rows of each label are spread evenly.

        So each split gets about the same shares of labels. A label of a single group stands in the
        middle, and so goes to train. The order stays if the answers are no labels.
        """
        by_label = grouped((self.texts[group[0]].answer, group) for group in groups)
        counts = {label: len(same) for label, same in by_label.items()}
        if "" in counts or not find_labels(counts):
            return groups
        places: list[tuple[float, list[int]]] = []
        for same in by_label.values():
            ends = [*accumulate(map(len, same))]  # of the groups, in rows of this label
            middles = [(end - len(one) / 2) / ends[-1] for end, one in zip(ends, same, strict=True)]
            places += zip(middles, same, strict=True)
        return [group for _, group in sorted(places, key=itemgetter(0))]
