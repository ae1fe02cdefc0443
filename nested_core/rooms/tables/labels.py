"""Answers that are a few labels: how many there are of each, and how many are answered rightly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from nested_core.data.data_settings import DataSettings
from nested_core.data.lines.example_parsing import read_examples
from nested_core.data.sources.split_files import open_splits
from nested_core.errors import shorten
from nested_core.report.page_blocks import PageBlocks
from nested_core.text.document import Block, Table, Text

MAX_LABELS = 50
MAX_LABEL_CHARACTERS = 100
MIN_ROWS_A_LABEL = 2  # on average: fewer are answers that happen to be equal


def find_labels(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the counts of labels, the most frequent first; empty if the answers are no labels.

    Answers are labels if there are from two to MAX_LABELS different ones, all short, and each is
    given MIN_ROWS_A_LABEL times on average.

    counts: how often each answer is given.
    """
    are_few = 2 <= len(counts) <= MAX_LABELS
    if not are_few or sum(counts.values()) < MIN_ROWS_A_LABEL * len(counts):
        return {}
    if any(len(answer) > MAX_LABEL_CHARACTERS for answer in counts):
        return {}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def tabulate_labels_of_data(settings: DataSettings) -> Iterator[Block]:
    """Yield how often each label is an answer in each split, where the answers are a few labels.

    A warning follows for each label that the first split, which is trained on, does not have.
    """
    counts: dict[str, Counter[str]] = {}
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        for file in open_splits(settings, Path(spool)).values():
            own = counts.setdefault(file.name, Counter())
            for _, example in read_examples(file.path, settings.field_names):
                answer = str(example.messages[-1].get("content")) if example.messages else ""
                own[answer] += 1
                if not 0 < len(answer) <= MAX_LABEL_CHARACTERS or len(own) > MAX_LABELS:
                    return
    labels = find_labels(sum(counts.values(), Counter[str]()))
    rows = [
        (
            label if label == label.strip() else repr(label),
            *(_share(own, label) for own in counts.values()),
        )
        for label in labels
    ]
    if rows:
        yield Table("How often each answer is given", ("answer", *counts), rows)
    trained = next(iter(counts), "")
    for label in labels:
        if not counts[trained][label] and labels[label] > 1:  # one given once is no label
            yield Text(
                f"warning: no row of {trained} has the label {shorten(label)!r}, which other "
                f"splits have: it will not be learnt. Shuffle the rows before they are split."
            )


def describe_share(right: int, questions: int) -> str:
    """Write a share, such as `4 of 20 (20%)`."""
    return f"{right} of {questions} ({right / questions:.0%})"


def _share(counts: Counter[str], label: str) -> str:
    """Write a share, such as `12 (40%)`."""
    return f"{counts[label]:,} ({counts[label] / (counts.total() or 1):.0%})"


def tabulate_labels_of_answers(
    name: str, answers: Sequence[tuple[str, str | None, str, float]]
) -> Iterator[Block]:
    """Count the right answers to the questions of each label, if the answers are a few labels.

    Args:
        name: of the eval set.
        answers: model, expected answer, answer and score, from 0 to 1, of each model in turn; at
            least one.

    Beside them is the share that the most frequent label alone would get.
    """
    models = dict.fromkeys(model for model, *_ in answers)
    judged = [*models][-1]
    expected = [label or "" for model, label, *_ in answers if model == judged]
    labels = {} if "" in expected else find_labels(Counter(expected))
    if not labels:
        return
    right = Counter((model, label) for model, label, _, score in answers if score >= 1)
    rows = [(label, count, *(right[m, label] for m in models)) for label, count in labels.items()]
    usual, most = next(iter(labels.items()))
    share = describe_share(most, len(expected))
    caption = f"{name} by label; always answering {shorten(usual, 60)!r} gets {share}"
    yield Table(caption, ("label", "questions", *models), rows)


BLOCKS = PageBlocks(of_answers=tabulate_labels_of_answers, of_data_set=tabulate_labels_of_data)
