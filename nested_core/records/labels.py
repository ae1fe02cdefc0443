"""Answers that are a few labels: whether they are, and how many of each are answered rightly."""

from __future__ import annotations

from collections.abc import Mapping

MAX_LABELS = 50
MAX_LABEL_CHARACTERS = 100
MIN_ROWS_A_LABEL = 3  # on average: fewer are answers that happen to be equal


def find_labels(counts: Mapping[str, int]) -> dict[str, int]:
    """How often each label is an answer, the most frequent first; empty where these are no labels.

    counts: how often each answer is given. Labels are from two to MAX_LABELS short answers, each
    given MIN_ROWS_A_LABEL times on average.
    """
    are_few = 2 <= len(counts) <= MAX_LABELS
    if not are_few or sum(counts.values()) < MIN_ROWS_A_LABEL * len(counts):
        return {}
    if any(len(answer) > MAX_LABEL_CHARACTERS for answer in counts):
        return {}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
