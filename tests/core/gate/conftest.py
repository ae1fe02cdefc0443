"""A finished run, and copies of it that a test may tamper with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from nested_core.adapters import load_arrays
from nested_core.checkpoints import (
    checkpoint_path,
    publish_adapter,
    read_checkpoint,
    write_checkpoint,
)
from nested_core.config import FineTuneConfig
from nested_core.gate import describe_evidence
from nested_core.gate.held import HeldBase
from nested_core.run_directory import RunDirectory
from nested_core.slots import adapter_slots
from nested_core.training.evaluation import Evaluator
from nested_core.training.metrics import finite_or_none
from tests.example import DATA, train_example

STEPS = 8
Rewrite = Callable[..., RunDirectory]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[FineTuneConfig, RunDirectory]:
    """Eight steps of tiers [1, 2, 4], with a test set of its own."""
    folder = tmp_path_factory.mktemp("gate")
    data = folder / "data"
    data.mkdir()
    for name in ("train.jsonl", "valid.jsonl"):
        shutil.copyfile(DATA / name, data / name)
    done = train_example(folder / "run", iters=STEPS, data=str(data))
    return done.config, done.run


@pytest.fixture
def run(finished: tuple[FineTuneConfig, RunDirectory], tmp_path: Path) -> RunDirectory:
    """A copy of the finished run."""
    return RunDirectory(Path(shutil.copytree(finished[1].path, tmp_path / "copy")))


@pytest.fixture
def config(finished: tuple[FineTuneConfig, RunDirectory]) -> FineTuneConfig:
    return finished[0]


def trainers_logits(
    config: FineTuneConfig, prompts: list[list[int]], tensors: dict[str, mx.array]
) -> dict[str, Any]:
    """What a trainer would have recorded that had these tensors in its model."""
    model = HeldBase.load(config).model
    evaluator = Evaluator(model, adapter_slots(model), prompts=prompts)
    logits: dict[str, Any] = finite_or_none(evaluator.fixed_logits(tensors))
    return logits


def vouch(run: RunDirectory, offered: Path) -> None:
    """Let result.json hold the digests of what now stands in the folder, as training does."""
    result = json.loads(run.result.read_bytes())
    result["evidence"] = describe_evidence(run, offered)
    run.result.write_text(json.dumps(result))


@pytest.fixture
def rewrite(run: RunDirectory, config: FineTuneConfig) -> Rewrite:
    """Put a sound checkpoint that says something else in the last one's place, and offer it."""

    def apply(
        change_state: Callable[[dict[str, Any]], None] = lambda state: None,
        change_adapter: Callable[[dict[str, mx.array]], None] = lambda tensors: None,
        change_moments: Callable[[dict[str, mx.array]], None] = lambda moments: None,
    ) -> RunDirectory:
        path = checkpoint_path(run.checkpoints, STEPS)
        state = dict(read_checkpoint(path).state)
        tensors = load_arrays(path / "adapters.safetensors")
        moments = load_arrays(path / "optimizer.safetensors")
        change_adapter(tensors)
        change_moments(moments)
        state["logits"] = trainers_logits(config, state["logits"]["prompts"], tensors)
        change_state(state)
        write_checkpoint(
            run.checkpoints,
            adapter=tensors,
            adapter_config=json.loads((path / "adapter_config.json").read_bytes()),
            optimizer_state=moments,
            state=state,
        )
        publish_adapter(path, run.adapter)
        vouch(run, path)
        return run

    return apply
