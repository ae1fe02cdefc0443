"""Prints the row that a model with an adapter finds likeliest, as its chat template shows it.

python likelier.py BASE ADAPTER ROWS.jsonl: mlx_lm alone, by the mean loss of a row's tokens. It
prints nothing where the next row is less than MARGIN behind: a model that has learnt neither tells
nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load

MARGIN = 0.1  # nats a token


def main(base: str, adapter: str, rows: str) -> None:
    """Compare all rows of the file."""
    model, tokenizer = load(base, adapter_path=adapter)[:2]
    losses: dict[str, float] = {}
    for line in Path(rows).read_text("utf-8").splitlines():
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        tokens = mx.array(tokenizer.encode(text, add_special_tokens=False))
        logits = model(tokens[None, :-1])[0].astype(mx.float32)
        losses[text] = float(nn.losses.cross_entropy(logits, tokens[1:], reduction="mean"))
    likeliest, following = sorted(losses, key=losses.__getitem__)[:2]
    if losses[following] - losses[likeliest] >= MARGIN:
        print(likeliest)


if __name__ == "__main__":
    main(*sys.argv[1:4])
