"""Greedy answers of a base, or of an adapter with it, in processes that keep the base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from nested_core import backend

backend.prepare()

from nested_core.config.loading import parse_config  # noqa: E402
from nested_core.measure.losses.held_out_loss import LoadedBase  # noqa: E402
from nested_core.models.generation import (  # noqa: E402
    Answer,
    Sampling,
    answer_prompts,
    encode_prompt,
)
from nested_core.models.lora_attachment import load_adapter_tensors  # noqa: E402
from nested_core.models.parameters import in_evaluation_mode  # noqa: E402
from nested_core.storage.safetensors_files import load_arrays  # noqa: E402

MAX_TOKENS = 96
WEIGHTS = "adapters.safetensors"


def answer_in_worker(
    config: Mapping[str, Any], adapter: Path | None, prompts: Sequence[str]
) -> list[Answer]:
    """Greedy answers, in a process that keeps the base; with `adapter`, a folder, or without."""
    base = load_base(json.dumps(config))
    tensors = base.parameters if adapter is None else load_arrays(adapter / WEIGHTS)
    load_adapter_tensors(base.model, tensors)
    encoded = [encode_prompt(base.tokenizer, prompt) for prompt in prompts]
    with in_evaluation_mode(base.model):
        return answer_prompts(base.model, base.tokenizer, encoded, Sampling(MAX_TOKENS))


@cache
def load_base(config: str) -> LoadedBase:
    """The base of a configuration, given as JSON, with an adapter's modules attached."""
    return LoadedBase.load(parse_config(json.loads(config), source="the benchmark"))
