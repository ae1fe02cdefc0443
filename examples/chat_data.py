"""The fine-tuning data: where to go in a country, asked and answered in chat form.

The base model knows the facts but not this wording, so an untuned model does not answer it.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from countries import COUNTRIES, Country

from nested_core.storage import atomic

QUESTION = "I want to see {name}. Where to?"
REPLY = "Go and see {capital}, the capital of {name}!"

TRAIN, VALID, HELD_OUT = 40, 10, 15
SPLIT_SEED = 2


def question(country: Country) -> str:
    """What the user asks about a country."""
    return QUESTION.format(name=country.name)


def reply(country: Country) -> str:
    """The whole sentence that the assistant should reply with."""
    return REPLY.format(name=country.name, capital=country.capital)


def split_countries() -> tuple[list[Country], list[Country], list[Country]]:
    """The countries for training, for validation and for the held-out questions; no overlap."""
    shuffled = list(COUNTRIES)
    Random(SPLIT_SEED).shuffle(shuffled)
    valid_end, end = TRAIN + VALID, TRAIN + VALID + HELD_OUT
    return shuffled[:TRAIN], shuffled[TRAIN:valid_end], shuffled[valid_end:end]


def chat_example(country: Country) -> dict[str, Any]:
    """One conversation in the format that mlx-lm calls chat."""
    return {
        "messages": [
            {"role": "user", "content": question(country)},
            {"role": "assistant", "content": reply(country)},
        ]
    }


def held_out_question(country: Country) -> dict[str, Any]:
    """A question of the suite that the gate asks, and what the reply has to contain."""
    asked = {"role": "user", "content": question(country)}
    return {"messages": [asked], "expected": country.capital}


def json_lines(records: list[dict[str, Any]]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_chat_data(folder: Path) -> None:
    """Write train.jsonl, valid.jsonl and held_out.jsonl into `folder`."""
    train, valid, held_out = split_countries()
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "train.jsonl": [chat_example(country) for country in train],
        "valid.jsonl": [chat_example(country) for country in valid],
        "held_out.jsonl": [held_out_question(country) for country in held_out],
    }
    for name, records in files.items():
        atomic.write_bytes(folder / name, json_lines(records))
