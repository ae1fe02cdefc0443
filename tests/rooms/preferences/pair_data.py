"""Pairs about capitals: a short answer is preferred to a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[3] / "examples"
BASE = EXAMPLES / "geography-base"
ROWS = {"train": 40, "valid": 10}
NAMES = ("Oscar", "Leo", "Clara", "Jack", "Tina")


def list_pairs(split: str) -> list[dict[str, Any]]:
    """A pair for each country of a split of the geography example."""
    lines = (EXAMPLES / "geography" / f"{split}.jsonl").read_text().splitlines()
    pairs = []
    for line in lines:
        asked, answered = json.loads(line)["messages"]
        (capital,) = re.findall(r"Go and see (.+), the", answered["content"])
        pairs.append(
            {
                "prompt": asked["content"],
                "chosen": f"See {capital} there.",
                "rejected": answered["content"],
            }
        )
    return pairs


def list_swapped_pairs(split: str) -> list[dict[str, Any]]:
    """The same pairs the wrong way round."""
    return [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
        for pair in list_pairs(split)
    ]


def list_pairs_of_own_answers(split: str) -> list[dict[str, Any]]:
    """Pairs of two answers that the base itself could give: the chosen one is a bit shorter."""
    rows = []
    for number, pair in enumerate(list_pairs(split)):
        first, second = NAMES[number % 5], NAMES[(number + 1) % 5]
        answer = f"Ask {first} and {second}"
        answers = {"chosen": f"{answer}.", "rejected": f"{answer} and {first}."}
        rows.append({"prompt": pair["prompt"], **answers})
    return rows


def write_rows(folder: Path, splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> Path:
    """A data folder with these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def write_pairs(folder: Path) -> Path:
    """A data folder with the pairs of train and valid."""
    return write_rows(folder, {split: list_pairs(split) for split in ROWS})


def make_values(data: Path, loss: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a small run with a loss, as its file has it."""
    values: dict[str, Any] = {
        "model": str(BASE),
        "data": str(data),
        "num_layers": -1,
        "batch_size": 8,
        "iters": 15,
        "learning_rate": 1e-3,
        "val_batches": -1,
        "steps_per_report": 5,
        "steps_per_eval": 5,
        "save_every": 5,
        "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0},
        "training": {"loss": loss},
    }
    return values | changes
