"""Rows that say of their turns whether they are learnt, as hypothesis draws them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from operator import not_
from typing import Any

from hypothesis import strategies as st

# What each mark may hold for yes and for no; a table of texts holds words.
YES: dict[str, tuple[Any, ...]] = {
    "train": (True, "true"),
    "trainable": (True, "TRUE"),
    "loss": (True, 0.0, 0.31, None),
    "weight": (1, 1.0, "1", None),
    "loss_mask": (1, True),
}
NO: dict[str, tuple[Any, ...]] = {
    "train": (False, "False"),
    "trainable": (False, 0),
    "loss": (False, "false"),
    "weight": (0, 0.0, "0"),
    "loss_mask": (0, False),
}
PIECES = (
    "Where",
    " is",
    " the river?",
    " ",
    "\n",
    "  x",
    "é",
    "\U0001f600",
    "1234",
    "'s",
    "_",
    "...",
)


@dataclass(frozen=True)
class MarkedRow:
    """A row of some format, and those of its answers that its marks let learn, in order."""

    row: dict[str, Any]
    learnt: tuple[str, ...]


def texts(number: int) -> st.SearchStrategy[str]:
    """Texts that no other turn has: all hold the number of their turn."""
    pieces = st.lists(st.sampled_from(PIECES), max_size=3).map("".join)
    return st.builds(lambda before, after: f"{before}turn {number}{after}", pieces, pieces)


@st.composite
def marks(draw: st.DrawFn) -> tuple[dict[str, Any], bool]:
    """The marks of a turn or a row, and whether one of them says no."""
    says_no = draw(st.booleans())
    keys = draw(st.lists(st.sampled_from(sorted(YES)), max_size=2, unique=True))
    drawn = {key: draw(st.sampled_from(YES[key])) for key in keys}
    if says_no:
        key = draw(st.sampled_from(sorted(NO)))
        drawn[key] = draw(st.sampled_from(NO[key]))
    return drawn, says_no


@st.composite
def marked_rows(draw: st.DrawFn) -> MarkedRow:
    """A conversation of one to three questions and answers, in a format that holds it.

    Its turns have marks where the format has a place for them. The row may have marks for all
    turns, or a list of marks for each turn or each answer.
    """
    count = draw(st.integers(1, 3))
    contents = [draw(texts(number)) for number in range(2 * count)]
    formats = ["chat", "sharegpt", "alpaca"] + ["completion"] * (count == 1)
    name = draw(st.sampled_from(formats))
    said = [draw(marks()) if name in ("chat", "sharegpt") else ({}, False) for _ in contents]
    system = draw(st.booleans()) and name != "completion"
    row = _write_row(name, contents, [one for one, _ in said], has_system=system)
    says_no = [no for _, no in said[1::2]]
    of_row = draw(st.sampled_from(["nothing", "marks", "a value a turn", "a value an answer"]))
    if of_row == "marks":
        row_marks, masks_all = draw(marks())
        row |= row_marks
        says_no = [no or masks_all for no in says_no]
    elif of_row != "nothing":
        values = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
        a_turn = [1] * (system and name == "chat") + [v for value in values for v in (0, value)]
        row["loss_mask"] = values if of_row == "a value an answer" else a_turn
        says_no = [no or not value for no, value in zip(says_no, values, strict=True)]
    return MarkedRow(row, tuple(compress(contents[1::2], map(not_, says_no))))


def _write_row(
    name: str, contents: list[str], said: list[dict[str, Any]], *, has_system: bool
) -> dict[str, Any]:
    if name == "completion":
        return {"prompt": contents[0], "completion": contents[1]}
    if name == "alpaca":
        pairs = [contents[n : n + 2] for n in range(0, len(contents), 2)]
        row = {"instruction": pairs[-1][0], "output": pairs[-1][1], "history": pairs[:-1]}
        return row | ({"system": "Be brief."} if has_system else {})
    if name == "sharegpt":
        turns = [
            {"from": "gpt" if n % 2 else "human", "value": content} | marks_of_turn
            for n, (content, marks_of_turn) in enumerate(zip(contents, said, strict=True))
        ]
        return {"conversations": turns} | ({"system": "Be brief."} if has_system else {})
    turns = [
        {"role": "assistant" if n % 2 else "user", "content": content} | marks_of_turn
        for n, (content, marks_of_turn) in enumerate(zip(contents, said, strict=True))
    ]
    system = [{"role": "system", "content": "Be brief."}] * has_system
    return {"messages": system + turns}
