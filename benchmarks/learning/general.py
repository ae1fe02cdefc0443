"""What an adapter should not lose: a base's own text, and its answers to general instructions.

Both are kept in the base's folder: `general.json` has tokens of a book, `instructions.json` has
instructions as tokens with the base's own greedy answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lm import batch_generate, load

from benchmarks.learning.bases import GENERAL_LENGTH, GENERAL_NAME, GENERAL_ROWS, choose_books

INSTRUCTIONS = "self-instruct/human_eval/user_oriented_instructions.jsonl"
INSTRUCTIONS_SHA256 = "81d60a117db495cecedecd9193504fd07c5b5a42f6699ef6b0f9da10fc22f42e"
INSTRUCTIONS_NAME = "instructions.json"
COUNT = 200
ANSWER_TOKENS = 48
PROMPT_TOKENS = 200  # longer instructions are left out


def write_general(books: Path, data: Path, base: Path) -> None:
    """Write both files; SystemExit where the instructions are not the recorded file."""
    model, tokenizer, *_ = load(str(base))
    held_out = tokenizer.encode(choose_books(books)[0].read_text(encoding="utf-8"))
    rows = [held_out[n * GENERAL_LENGTH :][:GENERAL_LENGTH] for n in range(1, GENERAL_ROWS + 1)]
    (base / GENERAL_NAME).write_text(json.dumps(rows), encoding="utf-8")
    prompts = read_instructions(data, tokenizer)
    answers = answer(model, tokenizer, prompts)
    pairs = [list(pair) for pair in zip(prompts, answers, strict=True)]
    (base / INSTRUCTIONS_NAME).write_text(json.dumps(pairs), encoding="utf-8")


def read_instructions(data: Path, tokenizer: Any) -> list[list[int]]:
    """The first COUNT instructions that are short enough, through the chat template."""
    content = (data / INSTRUCTIONS).read_bytes()
    if hashlib.sha256(content).hexdigest() != INSTRUCTIONS_SHA256:
        raise SystemExit(f"{data / INSTRUCTIONS} is not the file that PROTOCOL-2.md was for.")
    prompts = []
    for line in map(json.loads, content.splitlines()):
        text = "\n\n".join(filter(None, (line["instruction"], line["instances"][0]["input"])))
        turns = [{"role": "user", "content": text}]
        tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        if len(tokens) <= PROMPT_TOKENS:
            prompts.append(list(tokens))
    return prompts[:COUNT]


def answer(model: Any, tokenizer: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The greedy answers, as tokens, ANSWER_TOKENS at most each."""
    done = batch_generate(
        model, tokenizer, list(prompts), max_tokens=ANSWER_TOKENS, return_token_ids=True
    )
    return [list(tokens) for tokens in done.token_ids]
