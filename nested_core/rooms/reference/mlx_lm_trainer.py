"""Training as mlx_lm.lora trains, bit for bit: when it reports and evaluates, and what it draws.

Reports are due at iterations, within a step too, and evaluations before the update that they are
due with. Random draws continue from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.kernels.optimized_model import checkpointing_layers
from nested_core.storage.checkpoint import Checkpoint
from nested_core.training.due_parts import Reporter, Saver, Validation
from nested_core.training.evaluation import EvaluationInterrupted
from nested_core.training.train_step import StepResult, TrainStep
from nested_core.training.trainer import ReferenceTrainer, Trainer
from nested_core.training.training_state import TrainingState


class MlxLmReporter(Reporter):
    """Reports after the iteration that completes a multiple, within a step too."""

    def add_step(self, state: TrainingState, first: int, result: StepResult) -> None:
        """Add a step's micro-batches, from number `first`, and report in between."""
        last, every = first + len(result.micro_batches), self.setup.step_schedule.intervals.report
        for done, micro_batch in enumerate(result.micro_batches, start=first + 1):
            self.window.add_micro_batch(micro_batch)
            if done < last and done % every == 0:
                with self.window.pausing_clock():
                    self.write(state, done, self.report(state, done))

    def after_step(self, state: TrainingState, evaluation: dict[str, Any], *, is_due: bool) -> None:
        """Report if the last iteration completes a multiple: others were within the step."""
        every = self.setup.step_schedule.intervals.report
        super().after_step(state, evaluation, is_due=state.iteration % every == 0)


class MlxLmValidation(Validation):
    """Evaluates before the update of a step."""

    def due_before_step(self, first: int, last: int) -> list[int]:
        """List evaluations before the update, as the number of iterations done.

        The first one of all begins the run.
        """
        schedule = self.setup.step_schedule
        iterations = range(max(first + 1, 2), last + 1)
        every, end = schedule.intervals.evaluation, schedule.iterations
        return [each - 1 for each in iterations if each == end or each % every == 0]

    def after_step(self, state: TrainingState, *, is_due: bool) -> dict[str, Any]:
        """Evaluate nothing after a step."""
        return {}


class MlxLmSaver(Saver):
    """Keeps the key of the next random draw in each checkpoint."""

    def save(self, state: TrainingState, *, is_time: bool = False) -> None:
        """Write a checkpoint, with that key."""
        state.random_key = read_random_key()
        super().save(state, is_time=is_time)


class MlxLmTrainer(Trainer):
    """Trains as mlx_lm.lora does."""

    reporter_class = MlxLmReporter
    validation_class = MlxLmValidation
    saver_class = MlxLmSaver
    # A packed lora_a is stored transposed: BLAS may round its products unlike mlx_lm's.
    packs_adapters = False
    _validation: MlxLmValidation

    def using_training_layers(self) -> AbstractContextManager[None]:
        """Train mlx-lm's own layers; those that are recomputed draw new dropout masks."""
        self.model.train()
        recomputed = self.memory.layers_to_recompute(self.model)
        return checkpointing_layers(recomputed, keep_dropout_masks=False)

    def describe_layers(self) -> str:
        """Say that none of the layers is ours."""
        return "layers: mlx-lm's own, as training.reference asks"

    def _restore_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Take over what every trainer does, and draw on from the checkpoint's key."""
        super()._restore_checkpoint(checkpoint)
        if self.state.random_key is not None:
            restore_random_key(self.state.random_key)

    def _observe_before_step(self, train_step: TrainStep, first: int, last: int) -> None:
        """Evaluate and export what is due within the step [first, last), before it is applied.

        If an evaluation is interrupted, resume repeats them all.
        """
        reported = self.state.reported
        try:
            for done in self._validation.due_before_step(first, last):
                self._sync_model_and_optimizer(train_step)
                with self._reporter.window.pausing_clock():
                    evaluation = self._validation.evaluate(self.state, done)
                    if evaluation:
                        self._reporter.write(self.state, done, evaluation)
        except EvaluationInterrupted:
            self.state.reported = reported
            raise
        super()._observe_before_step(train_step, first, last)


def read_random_key() -> list[int]:
    """Return the key of MLX's next random draw in this thread, as two 32-bit words."""
    state: Any = mx.random.state
    words: list[int] = np.array(state[0]).tolist()
    return words


def restore_random_key(words: Sequence[int]) -> None:
    """Continue the random draws after a key: seeding with its 64 bits gives the key itself."""
    mx.random.seed((words[0] << 32) | words[1])


TRAINER = ReferenceTrainer(MlxLmTrainer)
