"""A finished run made to say something else, as a trainer with a fault would have left it.

Every digest agrees: what is wrong is found by judging, not by hashing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from nested_core.config.schema import FineTuneConfig
from nested_core.gate import digests_for_result
from nested_core.gate.held_out_loss import LoadedBase
from nested_core.models.parameters import reference_trainable_parameters
from nested_core.storage.adapter import read_adapter_config
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.checkpoint import publish_adapter, read_checkpoint, write_checkpoint
from nested_core.storage.checkpoint_verification import checkpoint_path
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from nested_core.training.evaluation import Evaluator

Arrays = dict[str, mx.array]


def nothing(value: Any) -> None:
    """Leave it as it is."""


def rewrite_run(
    config: FineTuneConfig,
    run: RunDirectory,
    *,
    change_state: Callable[[dict[str, Any]], None] = nothing,
    change_adapter: Callable[[Arrays], None] = nothing,
    change_moments: Callable[[Arrays], None] = nothing,
    change_config: Callable[[dict[str, Any]], None] = nothing,
    keeps_logits: bool = False,
) -> RunDirectory:
    """Put a sound checkpoint that says something else in the offered one's place, and offer it.

    `keeps_logits`: the trainer's model was what it was, only the files came out otherwise.
    """
    path = checkpoint_path(run.checkpoints, json.loads(run.result.read_bytes())["adapter_step"])
    state = dict(read_checkpoint(path).state)
    tensors = load_arrays(path / "adapters.safetensors")
    moments = load_arrays(path / "optimizer.safetensors")
    meaning = read_adapter_config(path / "adapter_config.json")
    change_adapter(tensors)
    change_moments(moments)
    change_config(meaning)
    if not keeps_logits and change_adapter is not nothing:
        state["logits"] = trainers_logits(config, state["logits"]["prompts"], tensors)
    change_state(state)
    write_checkpoint(
        run.checkpoints,
        adapter=tensors,
        adapter_config=meaning,
        optimizer_state=moments,
        state=state,
    )
    publish_adapter(path, run.adapter)
    vouch(run, path)
    return run


def trainers_logits(
    config: FineTuneConfig, prompts: list[list[int]], tensors: Arrays
) -> dict[str, Any]:
    """What a trainer would have recorded that had these tensors in its model."""
    model = LoadedBase.load(config).model
    refs = reference_trainable_parameters(model)
    fitting = {name: value for name, value in tensors.items() if name in refs}
    evaluator = Evaluator(model, refs, prompts=prompts)
    logits: dict[str, Any] = finite_or_none(evaluator.logits_on_fixed_prompts(fitting))
    return logits


def vouch(run: RunDirectory, offered: Path) -> None:
    """Let result.json hold the digests of what now stands in the folder, as training does."""
    result = json.loads(run.result.read_bytes())
    result["evidence"] = digests_for_result(run, offered)
    run.result.write_text(json.dumps(result))
