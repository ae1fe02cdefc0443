"""A data set of chat rows as large as wanted: made from words and a seed, all rows different."""

from __future__ import annotations

import json
import random
from pathlib import Path

_SYLLABLES = (
    "ka",
    "lo",
    "mi",
    "ten",
    "ra",
    "su",
    "ve",
    "dor",
    "pin",
    "est",
    "ul",
    "fa",
    "gri",
    "em",
)
_ACCENTED = ("café", "naïve", "Straße", "日本", "🙂")
_ACCENTED_ROWS = 20  # one row in so many has a letter beyond ASCII


def write_chats(path: Path, rows: int, seed: int = 0) -> None:
    """Write `rows` chats of two or four turns, about 450 bytes each."""
    dice = random.Random(seed)
    words = ["".join(dice.choices(_SYLLABLES, k=dice.randint(1, 4))) for _ in range(5000)]
    text = " ".join(dice.choices(words, k=200_000))
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            file.write(_chat(dice, text, row) + "\n")


def _chat(dice: random.Random, text: str, row: int) -> str:
    def said(shortest: int, longest: int) -> str:
        start = dice.randrange(len(text) - longest)
        return text[start : start + dice.randint(shortest, longest)].strip()

    accent = dice.choice(_ACCENTED) if row % _ACCENTED_ROWS == 0 else ""
    messages = [
        {"role": "user", "content": f"Question {row}: {said(40, 120)}?"},
        {"role": "assistant", "content": f"{said(80, 300)} {accent}".strip()},
    ]
    if row % 3 == 0:
        messages += [
            {"role": "user", "content": f"And\nthen {said(10, 60)}?"},
            {"role": "assistant", "content": said(40, 160)},
        ]
    return json.dumps({"messages": messages}, ensure_ascii=row % 2 == 0)
