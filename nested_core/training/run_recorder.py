"""What a run writes and reports while it trains: metrics.jsonl, callbacks, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.models.parameters import read_parameters
from nested_core.optim.gradient_checks import Flat
from nested_core.storage import checkpoint
from nested_core.storage.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    export_snapshot,
    read_adapter_config,
    write_adapter,
)
from nested_core.storage.atomic import TEMPORARY_PREFIX, finite_or_none
from nested_core.storage.checkpoint_verification import checkpoint_path
from nested_core.storage.safetensors_files import load_arrays
from nested_core.storage.validation_losses import (
    StepLosses,
    append_step_losses,
    truncate_step_losses,
)
from nested_core.training.early_stopping import count_evaluations_without_improvement
from nested_core.training.evaluation import Evaluation, Evaluator
from nested_core.training.loss.loss_interface import MicroBatch
from nested_core.training.metrics_file import append_metrics, read_metrics, truncate_metrics
from nested_core.training.metrics_window import (
    MetricsWindow,
    make_train_info,
    read_optimizer_metrics,
)
from nested_core.training.silent_failure_checks import (
    warn_of_flat_loss,
    warn_of_unchanged_checkpoint,
)
from nested_core.training.train_step import StepResult
from nested_core.training.training_setup import TrainingSetup
from nested_core.training.training_state import CheckpointState, TrainingState


class RunRecorder:
    """Reports, evaluates and saves; it reads the model and the optimizer and changes neither.

    All ranks call it, since what is reported is summed over them; the main one writes.
    """

    def __init__(self, setup: TrainingSetup, evaluator: Evaluator) -> None:
        self.setup = setup
        self.window = MetricsWindow(setup.world, is_mean=setup.loss_fn.is_mean)
        self._evaluator = evaluator
        self._losses: list[float] = []
        self._validation_targets = setup.step_schedule.validation_targets()
        initial = load_arrays(setup.run.initial / WEIGHTS_NAME)
        self._published_dtypes = {name: array.dtype for name, array in initial.items()}

    def begin(self, state: TrainingState) -> None:
        """Open metrics.jsonl: on resume at the state's step, else with step 0, before training."""
        is_resumed = state.step > 0
        if self.setup.world.is_main:
            metrics = self.setup.run.metrics
            state.reported = truncate_metrics(metrics, state.step, state.reported)
            truncate_step_losses(self.setup.run.validation_losses, state.step)
            records = read_metrics(metrics)
            self._losses = [r["loss"] for r in records if r.get("loss") is not None]
            if is_resumed:  # the process before may have ended between checkpoint and snapshot
                self._export_checkpoint_if_due(
                    checkpoint_path(self.setup.run.checkpoints, state.step), state
                )
        if state.open_report:
            self.window.reopen(state.open_report)
        if not is_resumed:
            self._append_metrics_record(state, {"iteration": 0} | self._evaluate(state, 0))
        self.window.restart_clock()

    def add_step(self, state: TrainingState, first: int, result: StepResult) -> None:
        """Add a step's micro-batches, from number `first`, with the reports between them."""
        self.window.add_gradient_bytes(result.gradient_bytes)
        last = first + len(result.micro_batches)
        reports = set(self.setup.step_schedule.reports_within(first, last)) - {last}
        for done, micro_batch in enumerate(result.micro_batches, start=first + 1):
            self.window.add_micro_batch(micro_batch)
            if done in reports:
                self.record_what_is_due(state, iteration=done, report=True)

    def record_what_is_due(
        self,
        state: TrainingState,
        *,
        iteration: int | None = None,
        report: bool = False,
        evaluate: bool = False,
        save: bool = False,
    ) -> None:
        """Do what is due now: one line of metrics, a checkpoint of this step or of the best.

        Raises EvaluationInterrupted if a stop is requested in the evaluation; nothing has changed
        then.
        """
        done = state.iteration if iteration is None else iteration
        with self.window.pausing_clock():
            evaluation = self._evaluate(state, done) if evaluate else {}
        with self.window.pausing_clock():
            state.observed = True
            record = (self._report(state, done) if report else {}) | evaluation
            if record:
                self._append_metrics_record(state, {"iteration": done} | record)
            is_best = evaluate and state.best_step == state.step
            if save or (is_best and self.setup.step_schedule.offers_best):
                self.save_checkpoint(state)

    def _append_metrics_record(self, state: TrainingState, record: dict[str, Any]) -> None:
        if self.setup.world.is_main:
            self.setup.run.require_lock()
            append_metrics(self.setup.run.metrics, {"step": state.step} | record)
        state.reported += 1

    def _report(self, state: TrainingState, iteration: int) -> dict[str, Any]:
        record = self.window.close_and_report() | read_optimizer_metrics(self.setup.optimizer)
        state.train_loss = record["loss"]
        state.trained_tokens += record.pop("tokens")
        self._losses.append(record["loss"])
        warn_of_flat_loss(state, self._losses, self.setup.config.training.flat_loss_reports)
        record["trained_tokens"] = state.trained_tokens
        record["peak_memory_gb"] = mx.get_peak_memory() / 1e9
        if self.setup.callback is not None:
            self.setup.callback.on_train_loss_report(make_train_info(state.step, iteration, record))
        return record

    def _evaluate(self, state: TrainingState, iteration: int) -> dict[str, Any]:
        """The validation loss, and the answers to `samples`; empty without either."""
        batches = self.setup.step_schedule.validation_batches(iteration)
        losses = {} if batches is None else self._measure_validation_loss(state, iteration, batches)
        if not self.setup.world.is_main:
            return losses
        values = read_parameters(self.setup.parameters)
        return losses | self.setup.samples.answer(self.setup.model, self.setup.parameters, values)

    def _measure_validation_loss(
        self, state: TrainingState, iteration: int, batches: Iterable[MicroBatch]
    ) -> dict[str, Any]:
        started = time.perf_counter()
        evaluation = self._evaluator.evaluate(read_parameters(self.setup.parameters), batches)
        val_loss = evaluation.mean_loss
        is_candidate = all(tier.updates > 0 for tier in self.setup.optimizer.get_tier_stats())
        state.record_evaluation(val_loss, is_candidate=is_candidate)
        self._keep_example_losses(state, evaluation, is_candidate=is_candidate)
        min_delta = self.setup.config.training.min_delta
        count_evaluations_without_improvement(state, val_loss, min_delta=min_delta)
        seconds = time.perf_counter() - started
        if self.setup.callback is not None:
            info = {"iteration": iteration, "val_loss": val_loss, "val_time": seconds}
            self.setup.callback.on_val_loss_report(info)
        return {"val_loss": val_loss}

    def _keep_example_losses(
        self, state: TrainingState, evaluation: Evaluation, *, is_candidate: bool
    ) -> None:
        """Append the losses of an evaluation whose step could be offered, for the gate."""
        if not (is_candidate and self.setup.step_schedule.offers_best and self.setup.world.is_main):
            return
        self.setup.run.require_lock()
        losses = StepLosses(step=state.step, lines=None, losses=None)
        if evaluation.row_sums is not None and self._validation_targets is not None:
            lines, tokens = self._validation_targets
            is_counted = tokens > 0
            means = evaluation.row_sums[: len(tokens)][is_counted] / tokens[is_counted]
            losses = StepLosses(
                step=state.step,
                lines=lines[is_counted].tolist(),
                losses=finite_or_none(means.tolist()),
            )
        append_step_losses(self.setup.run.validation_losses, losses)

    def save_checkpoint(self, state: TrainingState) -> None:
        """Write a checkpoint and remove those that are no longer to be kept."""
        state.open_report = self.window.sums_for_checkpoint()
        setup = self.setup
        if not setup.world.is_main:
            return
        if setup.step_schedule.keeps_random_state:
            state.random_key = read_random_key()
        values = read_parameters(setup.parameters)
        adapter = self._cast_to_published_dtypes(values)
        masters = {name: v for name, v in values.items() if v.dtype != adapter[name].dtype}
        record = CheckpointState(
            state,
            wanted_iterations=setup.config.iters,
            input_digests=setup.input_digests,
            tiers=setup.optimizer.get_tier_stats(),
            logits=self._evaluator.logits_on_fixed_prompts(adapter),
        )
        path = checkpoint.write_checkpoint(
            setup.run.checkpoints,
            adapter=adapter,
            masters=masters,
            adapter_config=self._adapter_config(),
            optimizer_state=setup.optimizer.state,
            state=record.to_json(),
            confirm=setup.run.require_lock,
        )
        if state.step >= max(2, *(tier.frequency for tier in setup.optimizer.tiers)):
            warn_of_unchanged_checkpoint(state, path, setup.run.initial)
        self._export_checkpoint_if_due(path, state)
        checkpoint.prune_checkpoints(
            setup.run.checkpoints,
            keep_last=setup.config.training.keep_checkpoints,
            keep_steps=state.steps_to_keep(may_flush=setup.optimizer.accumulates),
        )

    def snapshots_between(self, first: int, last: int) -> list[int]:
        """The iterations between the micro-batches [first, last) at which a snapshot is due."""
        if self.setup.config.adapter_path is None:
            return []
        every = self.setup.step_schedule.intervals.save
        return [done for done in range(first + 1, last) if done % every == 0]

    def export_snapshots(self, iterations: Sequence[int]) -> None:
        """Copy what the model holds to adapter_path, under each of these iterations.

        For iterations within a step, before it is taken: as in mlx_lm.lora, gradients that are
        still gathered are not in the snapshot.
        """
        run, adapter_path = self.setup.run, self.setup.config.adapter_path
        if adapter_path is None or not self.setup.world.is_main:
            return
        adapter = self._cast_to_published_dtypes(read_parameters(self.setup.parameters))
        with TemporaryDirectory(dir=run.path, prefix=TEMPORARY_PREFIX) as folder:
            write_adapter(Path(folder), adapter, self._adapter_config())
            for iteration in iterations:
                export_snapshot(Path(folder), adapter_path, run.path, iteration)

    def _export_checkpoint_if_due(self, checkpoint_folder: Path, state: TrainingState) -> None:
        """Copy a checkpoint to adapter_path where mlx_lm.lora writes a snapshot of its iteration.

        Checkpoints that are written for another reason, such as the best, are not copied.
        """
        adapter_path = self.setup.config.adapter_path
        is_due = state.iteration % self.setup.step_schedule.intervals.save == 0
        if adapter_path is not None and is_due:
            run_dir, iteration = self.setup.run.path, state.iteration
            export_snapshot(checkpoint_folder, adapter_path, run_dir, iteration)

    def _cast_to_published_dtypes(self, values: Flat) -> Flat:
        """Trained values in the dtypes that the adapter is published in."""
        return {name: value.astype(self._published_dtypes[name]) for name, value in values.items()}

    def _adapter_config(self) -> dict[str, Any]:
        return read_adapter_config(self.setup.run.initial / CONFIG_NAME)


def read_random_key() -> list[int]:
    """The key of MLX's next random draw in this thread, as two 32-bit words."""
    state: Any = mx.random.state
    words: list[int] = np.array(state[0]).tolist()
    return words


def restore_random_key(words: Sequence[int]) -> None:
    """Continue the random draws after a key: seeding with its 64 bits gives the key itself."""
    mx.random.seed((words[0] << 32) | words[1])
