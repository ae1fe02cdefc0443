"""nested-tune's own training on preferences, broken in two places; the room's tests use it too."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any


def read_trained(module: ModuleType) -> None:
    """reference_likelihoods, which takes the adapter TRAINED_ADAPTER for the initial one."""
    read_adapter = module.read_adapter

    def read(_: Path) -> Any:
        return read_adapter(Path(os.environ["TRAINED_ADAPTER"]))

    vars(module)["read_adapter"] = read


def count_prompts(module: ModuleType) -> None:
    """answer_rows, whose pairs have their prompts supervised beside their answers."""
    broken = replace(module.PAIRS["pair"], encode=supervise_prompts(module.encode_pair))
    module.PAIRS["pair"] = broken


def supervise_prompts(encode_pair: Callable[..., Any]) -> Callable[..., Any]:
    """A function that encodes a pair as encode_pair does, with both prompts supervised."""

    def encode(example: Any, tokenizer: Any) -> Any:
        encoded = encode_pair(example, tokenizer)
        (prompt, end), (second, last) = encoded.spans
        return replace(encoded, spans=((1, end), (second - prompt + 1, last)))

    return encode
