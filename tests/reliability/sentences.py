"""A synthetic task of which any number of examples can be drawn from one distribution.

The reply repeats a person, a quality and a thing of the question, in a wording that the example
model has not been taught; what the person does is left to chance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

# Words that the example model knows: 45,000 sentences.
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Jack", "Karen")
ACTIONS = ("buys", "carries", "cleans", "draws", "finds", "hides", "likes", "paints", "sells")
QUALITIES = (
    *("big", "blue", "bright", "broken", "clean", "cold", "dark", "empty", "fast", "green"),
    *("heavy", "light", "new", "old", "quiet", "red", "round", "small", "soft", "warm"),
)
THINGS = (
    *("apple", "bag", "ball", "bird", "boat", "book", "bridge", "car", "cat", "chair", "clock"),
    *("cup", "dog", "door", "garden", "hat", "horse", "house", "lamp", "letter", "picture"),
    *("river", "table", "tree", "window"),
)


def draw_examples(random: Random, count: int) -> list[str]:
    """Different chat examples as lines of JSON, in the order in which they were drawn."""
    lines: dict[str, None] = {}
    while len(lines) < count:
        person, thing = random.choice(PEOPLE), random.choice(THINGS)
        action, quality = random.choice(ACTIONS), random.choice(QUALITIES)
        turns = [
            {"role": "user", "content": f"What about the {quality} {thing}, {person}?"},
            {"role": "assistant", "content": f"{person} {action} the {quality} {thing}."},
        ]
        lines[json.dumps({"messages": turns})] = None
    return list(lines)


def write_data(folder: Path, splits: Mapping[str, Sequence[str]]) -> Path:
    """A data folder with a file for each split."""
    folder.mkdir(parents=True)
    for name, lines in splits.items():
        content = "".join(f"{line}\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    return folder
