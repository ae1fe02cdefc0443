"""Marks by which a row or a turn says whether it is learnt: `weight: 0`, `train: false`.

OpenAI and Fireworks use `weight`, axolotl `train`, ms-swift and XTuner `loss`. A mark that says no
decides, on a turn or on its row; one that says yes changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nested_core.data.lines.json_decoding import LineProblem, parse_json_text
from nested_core.errors import join_first_values, shorten

# Each is true or false, or 1 or 0. A `loss` that is a number is one that somebody logged: no mark.
MARK_KEYS = ("train", "trainable", "loss", "weight", "loss_mask")


def take_marks(
    row: Mapping[str, object], turns: list[dict[str, object]], places: Sequence[str]
) -> tuple[set[str], dict[int, str]]:
    """Return which of a row's keys are marks, and which turns are not to be learnt.

    Turns are returned by index, each with the place of the mark, such as `messages[1].weight`.
    Marks of turns are removed from `turns`.

    Args:
        row: the keys that are not part of the conversation.
        turns: empty for plain text, which is one answer.
        places: the row's field of each turn; `system` for a system prompt in a field.

    Raises LineProblem for a mark that says neither yes nor no, for a list of marks with a wrong
    length, and if no answer is left to learn.
    """
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    keys, masked = _read_row_marks(row, len(turns) or 1, answers, places.count("system"))
    for index, (turn, place) in enumerate(zip(turns, places, strict=True)):
        mark_values = {k: _read_mark(k, turn[k], f"{place}.{k}") for k in MARK_KEYS if k in turn}
        marks = [key for key, is_learnt in mark_values.items() if is_learnt is not None]
        if marks:
            turns[index] = {key: value for key, value in turn.items() if key not in marks}
        for key in marks:
            if not mark_values[key]:
                masked[index] = f"{place}.{key}"
    # Of a row without answers the last turn is learnt
    learnt = answers or [max(len(turns) - 1, 0)]
    if masked.keys() >= set(learnt):
        raise LineProblem("nothing-to-learn", describe_nothing_to_learn(learnt, masked))
    return keys, masked


def _read_row_marks(
    row: Mapping[str, object], turns: int, answers: Sequence[int], before: int
) -> tuple[set[str], dict[int, str]]:
    """Read the marks that stand in the row itself: which parts of it are not to be learnt.

    A mark is a key of MARK_KEYS, such as `weight: 0`. It is one value for all turns, or a list with
    a value for each turn or for each answer.

    turns: how many turns the row has. answers: the indices of those that are the assistant's.
    before: how many of the first turns come from a field of their own; a list may leave them out.

    Returns the keys that are marks, and by turn that is not to be learnt, the key that says so.
    """
    every = range(turns)
    # Which turns a list is about is known by its length; where lengths agree, the later entry holds
    by_length = {len(answers): answers, turns - before: every[before:], turns: every}
    keys: set[str] = set()
    masked: dict[int, str] = {}
    for key in [key for key in MARK_KEYS if key in row]:
        value = parse_json_text(row[key], key)
        values = value if isinstance(value, list) else [value] * turns
        marks = [_read_mark(key, one, key) for one in values]
        if value is not None and all(is_learnt is None for is_learnt in marks):
            continue
        keys.add(key)
        if len(marks) not in by_length:
            raise LineProblem(
                "bad-mark",
                f"{key}: expected a value for each of {turns} turns, or for each of "
                f"{len(answers)} answers, found a list of {len(marks)}{_describe_remedy(key)}",
            )
        pairs = zip(by_length[len(marks)], marks, strict=True)
        masked |= {turn: key for turn, is_learnt in pairs if is_learnt is False}
    return keys, masked


def _read_mark(key: str, value: object, place: str) -> bool | None:
    """Return what a mark says: True, False, or None if it is no mark (null, or a logged loss).

    A table of texts has words for it, in any case. Raises LineProblem for another value.
    """
    if isinstance(value, str):
        value = parse_json_text(value.casefold(), place)
    if value is None or (key == "loss" and not isinstance(value, bool)):
        return None
    if not isinstance(value, int | float) or value not in (0, 1):
        found = f"a {type(value).__name__}" if isinstance(value, list | dict) else shorten(value)
        raise LineProblem(
            "bad-mark",
            f"{place}: expected 0 or 1, or false or true, found {found}: a turn is learnt whole or "
            f"not at all{_describe_remedy(key)}",
        )
    return bool(value)


def describe_nothing_to_learn(answers: Sequence[int], masked: Mapping[int, str]) -> str:
    """Say that all answers are marked as not to be learnt, and what to do about it."""
    marks = list(dict.fromkeys(masked[turn] for turn in answers))
    return (
        f"nothing is left to learn, for the answers are marked as not to be learnt "
        f"({join_first_values(marks, 2)}): leave the row out"
        f"{_describe_remedy(marks[0].rpartition('.')[2])}"
    )


def _describe_remedy(key: str) -> str:
    """Return the advice to ignore a mark."""
    return f"; drop_fields: [{key}] reads the rows without this mark"
