"""The prompts on which the trainer and a fresh process compute logits that are compared."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest

from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.training.evaluation import choose_prompts

SYSTEM = list(range(1, 31))  # a system prompt longer than a prompt


def split_of(*examples: list[int]) -> TokenizedSplit:
    """A split with these tokens."""
    tokens = np.array([token for example in examples for token in example], np.int32)
    starts = np.array([0, *accumulate(map(len, examples))], np.int64)
    lines = np.arange(1, len(examples) + 1, dtype=np.int32)
    return TokenizedSplit(tokens, tokens > 0, starts, lines, lines.astype(np.uint64))


def test_prompts_differ_where_all_examples_begin_with_one_system_prompt() -> None:
    examples = [[*SYSTEM, 100 + number, 7] for number in range(6)]
    prompts = choose_prompts({"valid": split_of(*examples)})
    assert prompts == [(1, *range(18, 31), 100 + number, 7) for number in range(4)]


def test_examples_that_end_alike_are_one_prompt() -> None:
    yes, no = [*SYSTEM, 8], [*SYSTEM, 9]
    assert len(choose_prompts({"valid": split_of(yes, no, yes, no, yes)})) == 2


@pytest.mark.parametrize("length", [1, 15, 16])
def test_a_short_example_is_a_prompt_as_it_stands(length: int) -> None:
    assert choose_prompts({"train": split_of(SYSTEM[:length], [])}) == [tuple(SYSTEM[:length])]
