"""How long 200 answers of 64 tokens take at the shape of a 7B model, with a LoRA adapter.

`python -m benchmarks.answers [SIZE]`: random weights, prompts of 24 to 96 tokens, greedy, batched
as the gate asks its suites. Of the answers none ends early: no token is the end of a text.
"""

from __future__ import annotations

import random
import sys
import time

from nested_core import backend

backend.prepare()

import mlx.core as mx  # noqa: E402

from benchmarks.gpu.mlx_arms import build  # noqa: E402
from benchmarks.gpu.shapes import SHAPES  # noqa: E402
from nested_core.models.generation import Sampling, answer_prompts  # noqa: E402

ANSWERS, TOKENS = 200, 64


class _Detokenizer:
    """Counts tokens: what they would read as is of no interest."""

    def __init__(self) -> None:
        self.text = ""

    def add_token(self, token: int) -> None:
        """A letter for each token."""
        self.text += "x"

    def finalize(self) -> None:
        """Nothing is left over."""


class _Tokenizer:
    eos_token_ids: frozenset[int] = frozenset()

    @property
    def detokenizer(self) -> _Detokenizer:
        """A new one for each answer."""
        return _Detokenizer()


def main(size: str) -> None:
    """Answer once to warm up and once measured."""
    shape = SHAPES[size]
    model = build(shape, 16)
    draws = random.Random(0)
    prompts = [
        [draws.randrange(3, shape.vocabulary) for _ in range(draws.randint(24, 96))]
        for _ in range(ANSWERS)
    ]
    sampling = Sampling(max_tokens=TOKENS)
    answer_prompts(model, _Tokenizer(), prompts[:32], Sampling(max_tokens=8))
    mx.reset_peak_memory()
    began = time.perf_counter()
    answers = answer_prompts(model, _Tokenizer(), prompts, sampling)
    seconds = time.perf_counter() - began
    tokens = sum(answer.tokens for answer in answers)
    print(
        f"{size}: {len(answers)} answers, {tokens} tokens in {seconds:.1f} s "
        f"({tokens / seconds:,.0f} tokens/s), peak {mx.get_peak_memory() / 2**30:.1f} GiB"
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "7B")
