"""A trained real model, exported, in other programs: its answers beside mlx_lm's with the adapter.

`python -m benchmarks.real_model.other_readers EXPORT --base BASE --adapter ADAPTER --questions
QUESTIONS.jsonl`, where EXPORT is a folder of `export --peft`, read by transformers and PEFT, or a
file of `export --gguf`, read by llama.cpp. Each question is answered greedily with float32 weights
or the file's by both programs. Where they part, the tie is named: how far apart the two tokens'
logits are in the other program. Of a GGUF the tokens of reference.json's 200 texts are compared
too. Needs mlx-lm, and torch, transformers and peft, or llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

MOST_TOKENS = 32
Answer = tuple[list[Any], list[int]]  # the logits that each token was chosen by, and the tokens
Reader = Callable[[Sequence[int], set[int]], Answer]


def main() -> None:
    """Print how many answers are equal, and each question where they are not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--questions", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer, *_ = load(options.base, adapter_path=options.adapter)
    model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))
    is_gguf = options.export.is_file()
    read = read_gguf(options.export) if is_gguf else read_peft(options.base, options.export)
    equal, lines = 0, options.questions.read_text(encoding="utf-8").splitlines()
    for line in lines:
        turns = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        ours = answer(model, prompt, tokenizer.eos_token_ids)
        logits, theirs = read(prompt, tokenizer.eos_token_ids)
        equal += ours == theirs
        if ours != theirs:
            print(describe_parting(turns[-1]["content"], ours, theirs, logits), flush=True)
    print(f"{equal} of {len(lines)} answers are equal to the token", flush=True)


def answer(model: Any, prompt: Sequence[int], ends: set[int]) -> list[int]:
    """The greedy answer of mlx_lm's model, its end included."""
    cache = make_prompt_cache(model)

    def advance(tokens: Sequence[int]) -> Any:
        return model(mx.array([tokens]), cache=cache)[0, -1]

    return answer_greedily(advance, prompt, ends)[1]


def answer_greedily(
    advance: Callable[[Sequence[int]], Any], prompt: Sequence[int], ends: set[int]
) -> Answer:
    """The likeliest tokens up to an end; `advance` takes tokens and gives the next one's logits."""
    tokens, said, seen = list(prompt), list[int](), list[Any]()
    while len(said) < MOST_TOKENS and (not said or said[-1] not in ends):
        seen.append(advance(tokens))
        tokens = [int(seen[-1].argmax())]
        said += tokens
    return seen, said


def read_peft(base: str, folder: Path) -> Reader:
    """What answers with the base and the PEFT adapter, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, folder).eval()

    def read(prompt: Sequence[int], ends: set[int]) -> Answer:
        cache = None

        def advance(tokens: Sequence[int]) -> Any:
            nonlocal cache
            output = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            return output.logits[0, -1]

        with torch.no_grad():
            return answer_greedily(advance, prompt, ends)

    return read


def read_gguf(file: Path) -> Reader:
    """What answers with the file in llama.cpp; it first compares the tokens of the 200 texts."""
    from benchmarks.real_model.make_model import REFERENCE
    from nested_core.rooms.export.llama_cpp_program import LlamaCppReader

    llama = LlamaCppReader(str(file), {"rows": [], "questions": [], "prompts": [[0] * 1024]})
    texts = json.loads(REFERENCE.read_text(encoding="utf-8"))["texts"]
    equal = sum(llama.encode(text["text"]) == text["ids"] for text in texts)
    print(f"{equal} of {len(texts)} texts have the same tokens", flush=True)

    def read(prompt: Sequence[int], ends: set[int]) -> Answer:
        said = list[int]()

        def advance(_: Sequence[int]) -> Any:
            tokens = [*prompt, *said]
            (rows,) = llama.logits(tokens, [len(tokens) - 1])
            said.append(int(rows[0].argmax()))
            return rows[0]

        return answer_greedily(advance, prompt, ends)

    return read


def describe_parting(
    asked: str, ours: Sequence[int], theirs: Sequence[int], logits: Sequence[Any]
) -> str:
    """The first token that differs, and its distance from the other's in logits."""
    place = next(n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    apart = float(logits[place][theirs[place]] - logits[place][ours[place]])
    return f"{asked!r}: token {place + 1} is {ours[place]} and {theirs[place]}, {apart:.2g} apart"


if __name__ == "__main__":
    main()
