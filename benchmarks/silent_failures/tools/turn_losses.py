"""Prints what a training did to the loss of each turn of some rows, without it and with it.

python turn_losses.py BASE ADAPTER ROWS.jsonl: mlx_lm alone. One line of JSON: the turn as the chat
template shows it, and the mean loss of its tokens by the base and by the base with the adapter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load


def main(base: str, adapter: str, file: str) -> None:
    """Measure all rows of the file."""
    rows = [json.loads(line)["messages"] for line in Path(file).read_text("utf-8").splitlines()]
    before = measure(*load(base)[:2], rows)
    after = measure(*load(base, adapter_path=adapter)[:2], rows)
    print(json.dumps({turn: [before[turn], after[turn]] for turn in before}))


def measure(model: Any, tokenizer: Any, rows: list[list[dict[str, Any]]]) -> dict[str, float]:
    """The mean loss of each turn's tokens, where it stands first."""
    losses: dict[str, float] = {}
    for messages in rows:
        shown = [
            tokenizer.apply_chat_template(messages[:number], tokenize=False) if number else ""
            for number in range(len(messages) + 1)
        ]
        ends = [len(tokenizer.encode(text, add_special_tokens=False)) for text in shown]
        tokens = mx.array(tokenizer.encode(shown[-1], add_special_tokens=False))
        logits = model(tokens[None, :-1])[0].astype(mx.float32)
        by_token = nn.losses.cross_entropy(logits, tokens[1:])
        for number in range(len(messages)):
            turn = shown[number + 1][len(shown[number]) :]
            first = max(ends[number] - 1, 0)  # the first token of a row has no loss
            loss = float(by_token[first : ends[number + 1] - 1].mean())
            losses.setdefault(turn, round(loss, 3))
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:4])
