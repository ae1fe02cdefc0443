"""The tiny example that the tests train on: its configuration, and runs of it in one call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlx_lm import load

from nested_core.config.loading import parse_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.models.generation import Sampling, answer_prompts
from nested_core.pipeline import steps
from nested_core.records.metrics import read_metrics
from nested_core.records.result import TrainResult
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.storage.checkpoint_verification import checkpoint_path
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reports.training_callback import TrainingCallback
from nested_core.training.trainer import Trainer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODEL, DATA = EXAMPLES / "geography-base", EXAMPLES / "geography"
# A small adapter, and a run of it with one checkpoint, for tests that spoil many copies.
SMALL = {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
SMALL_RUN: dict[str, Any] = {"iters": 8, "val_batches": 1, "lora_parameters": SMALL}
ANSWERS = {"sample_tokens": 12}  # of the section `training`: enough to say one word for ever
SPEEDS = ("tokens_per_second", "iterations_per_second", "peak_memory_gb")

# As in examples/geography.yaml, but with small batches, few of them, the last three of six layers,
# a tier each (all of them take a run and its verdict half as long again), and sample answers of one
# token: longer ones take a judging as long as the losses. Tests that read answers ask for more.
SETTINGS: dict[str, Any] = {
    "model": str(MODEL),
    "data": str(DATA),
    "num_layers": 3,
    "batch_size": 2,
    "iters": 8,
    "learning_rate": 2e-3,
    "mask_prompt": True,
    "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0},
    "nested": {"frequencies": [1, 2, 4]},
    "training": {"max_grad_norm": 1.0, "sample_tokens": 1},
}


def example_settings(**changes: Any) -> dict[str, Any]:
    """The values of a configuration file; a section given replaces some keys of that section."""
    sections = {
        key: SETTINGS[key] | value
        for key, value in changes.items()
        if isinstance(SETTINGS.get(key), dict)
    }
    return SETTINGS | changes | sections


def example_config(**changes: Any) -> FineTuneConfig:
    """A configuration of the example, with changes."""
    return FineTuneConfig.model_validate(example_settings(**changes))


def require_refused(pattern: str, **changes: Any) -> None:
    """Expect that a configuration of the example with these changes cannot be used."""
    with pytest.raises(ConfigError, match=pattern):
        parse_config(example_settings(**changes), source="test.yaml")


def write_config(path: Path, **changes: Any) -> Path:
    """The same as a YAML file for the command line."""
    path.write_text(yaml.safe_dump(example_settings(**changes)), encoding="utf-8")
    return path


def prepare(config: FineTuneConfig, path: Path) -> RunDirectory:
    """A run that has been validated and loaded, and is not trained yet."""
    run = RunDirectory(path)
    path.mkdir(parents=True, exist_ok=True)
    steps.write_run_config(config, run, resume=False)
    steps.validate(config, run)
    steps.write_initial_adapter_and_tiers(config, run)
    return run


@dataclass(frozen=True)
class Finished:
    """A run that was trained in this process, with its trainer still at hand."""

    config: FineTuneConfig
    run: RunDirectory
    result: TrainResult
    trainer: Trainer

    def at(self, step: int) -> Adapter:
        """The adapter of a checkpoint; of step 0 the initial one."""
        folder = self.run.initial if step == 0 else checkpoint_path(self.run.checkpoints, step)
        return read_adapter(folder)

    def metrics(self, *, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, less some keys."""
        records = read_metrics(self.run.metrics)
        return [{k: v for k, v in record.items() if k not in without} for record in records]


def train(
    config: FineTuneConfig,
    run: RunDirectory,
    callback: TrainingCallback | None = None,
    on_start: Callable[[Trainer], None] | None = None,
) -> Finished:
    """Train a prepared run to its end, or as far as it goes."""
    trainers: list[Trainer] = []

    def begin(trainer: Trainer) -> None:
        trainers.append(trainer)
        if on_start is not None:
            on_start(trainer)

    result = steps.train(config, run, callback, begin)
    return Finished(config, run, result, trainers[0])


def train_example(path: Path, **changes: Any) -> Finished:
    """Prepare and train a run of the example with these changes."""
    config = example_config(**changes)
    return train(config, prepare(config, path))


def train_until_answers_are_broken(path: Path, **changes: Any) -> Finished:
    """A run whose loss falls far, and whose answers then say one word to their end.

    It learns the example's answers, each with a word that is repeated after it. (Which rate is too
    high for a model depends on how a processor rounds, and so is no way to break one in a test.)
    """
    data = path.parent / f"{path.name}-data"
    data.mkdir(parents=True)
    rows = list(map(json.loads, (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()))
    for row in rows:
        row["messages"][1]["content"] += " and" * 40
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (data / "train.jsonl").write_text(lines, encoding="utf-8")
    shutil.copy(DATA / "valid.jsonl", data)
    answers = {"sample_tokens": 36}  # an answer of the example takes some 12
    return train_example(path, **{"data": str(data), "iters": 40, "training": answers} | changes)


class AfterStep:
    """True once a trainer has done so many steps; in place of `stop_requested` it stops there."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self._trainer, self._step = trainer, step

    def __bool__(self) -> bool:
        return self._trainer.current_step >= self._step


def stop_after(step: int) -> Callable[[Trainer], None]:
    """For `on_start`: ask for a stop when so many optimizer steps are done."""

    def watch(trainer: Trainer) -> None:
        request: Any = AfterStep(trainer, step)
        trainer.stop_requested = request

    return watch


def generate_answers(
    model: str, prompts: Sequence[str], *, adapter: Path | None = None, max_tokens: int = 32
) -> list[str]:
    """One greedy answer a prompt, sent as a user's message, through plain mlx_lm.load."""
    loaded, tokenizer = load(model, adapter_path=None if adapter is None else str(adapter))[:2]
    tokens = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )
        for prompt in prompts
    ]
    answers = answer_prompts(loaded, tokenizer, tokens, Sampling(max_tokens))
    return [answer.text.strip() for answer in answers]
