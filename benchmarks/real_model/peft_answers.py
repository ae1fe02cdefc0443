"""The PEFT export of a trained real model in transformers: its answers beside mlx_lm's.

`python -m benchmarks.real_model.peft_answers BASE ADAPTER PEFT QUESTIONS.jsonl` answers each
question greedily in float32 with both programs. Where they part, the tie is named: how far apart
the two tokens' logits are in transformers. Needs torch, transformers, peft and mlx-lm; nothing of
this project, whose `export-peft` wrote PEFT from ADAPTER.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
from mlx.utils import tree_map
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache
from peft import PeftModel
from transformers import AutoModelForCausalLM

MOST_TOKENS = 32


def main() -> None:
    """Print how many answers are equal, and each question where they are not."""
    base, adapter, peft, questions = sys.argv[1:]
    model, tokenizer, *_ = load(base, adapter_path=adapter)
    model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, peft).eval()
    equal, lines = 0, Path(questions).read_text(encoding="utf-8").splitlines()
    for line in lines:
        turns = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        ours = answer(model, prompt, tokenizer.eos_token_ids)
        logits, answered = answer_in_transformers(theirs, prompt, tokenizer.eos_token_ids)
        equal += ours == answered
        if ours != answered:
            print(describe_parting(turns[0]["content"], ours, answered, logits), flush=True)
    print(f"{equal} of {len(lines)} answers are equal to the token", flush=True)


def answer(model: Any, prompt: Sequence[int], ends: set[int]) -> list[int]:
    """The greedy answer of mlx_lm's model, its end included."""
    cache, tokens, said = make_prompt_cache(model), list(prompt), list[int]()
    while len(said) < MOST_TOKENS and (not said or said[-1] not in ends):
        logits = model(mx.array([tokens]), cache=cache)[0, -1]
        tokens = [int(logits.argmax().item())]
        said += tokens
    return said


def answer_in_transformers(
    model: Any, prompt: Sequence[int], ends: set[int]
) -> tuple[list[Any], list[int]]:
    """The greedy answer of transformers' model, and the logits of each of its tokens."""
    cache, tokens, said, seen = None, list(prompt), list[int](), list[Any]()
    with torch.no_grad():
        while len(said) < MOST_TOKENS and (not said or said[-1] not in ends):
            output = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[0, -1]
            tokens = [int(logits.argmax())]
            said += tokens
            seen.append(logits)
    return seen, said


def describe_parting(
    asked: str, ours: Sequence[int], theirs: Sequence[int], logits: Sequence[Any]
) -> str:
    """The first token that differs, and its distance from the other's in logits."""
    place = next(n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    apart = float(logits[place][theirs[place]] - logits[place][ours[place]])
    return f"{asked!r}: token {place + 1} is {ours[place]} and {theirs[place]}, {apart:.2g} apart"


if __name__ == "__main__":
    main()
