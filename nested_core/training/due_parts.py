"""The parts of training that act only at some steps: reports, evaluations and checkpoints.

The loop in trainer.py calls each part after every step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from nested_core.backend import to_float, to_int
from nested_core.models.parameters import read_parameters
from nested_core.optim.gradients import Flat, clip_factor
from nested_core.optim.tier_counters import COUNTERS_KEY
from nested_core.optim.tiered import Tiered
from nested_core.records.metrics import append_metrics, read_metrics, truncate_metrics
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
from nested_core.training.evaluation import Evaluation, EvaluationInterrupted, Evaluator
from nested_core.training.loss.loss_interface import MicroBatch
from nested_core.training.train_step import StepResult
from nested_core.training.training_checks import (
    warn_of_flat_loss,
    warn_of_rounded_updates,
    warn_of_unchanged_checkpoint,
)
from nested_core.training.training_setup import TrainingSetup
from nested_core.training.training_state import TrainingState
from nested_core.training.world import Sums, World

# If the answers are only shown and take longer than this before the first step, fewer questions are
# asked later. If answers select the step, all are asked: a base that does not end its answers may
# take minutes for what the adapter answers in a second, and too few questions would be left.
SLOW_SECONDS = 10.0
# If the answers are only shown, this many steps lie between two evaluations that ask; a shorter run
# asks LEAST_ASKINGS times. With a tiny model asking then takes some 4 % of the whole command.
STEPS_BETWEEN_QUESTIONS = 300
LEAST_ASKINGS = 4


class MetricsWindow:
    """Sums of loss, tokens and time since the last report; only training steps count as time.

    The sums stay on the device until the report. Each rank adds up its own. When they are read,
    they are summed over the ranks, and the main rank continues with the total.
    """

    def __init__(self, world: World, *, is_mean: bool = False) -> None:
        """Create an empty window; `is_mean` means that mean losses are averaged as in mlx-lm."""
        self._world = world
        self._is_mean = is_mean
        self._restart_window()

    def _restart_window(self) -> None:
        """Set all sums to zero and restart the clock."""
        self.sums = _zero_sums()
        self.is_open = False
        self._earlier_tokens = 0
        self._iterations = 0
        self.gradient_bytes = 0  # that steps sent to the other ranks
        self.restart_clock()

    def reopen(self, sums: Mapping[str, Any]) -> None:
        """Continue the window of a checkpoint from its sums; a loss of None was not finite."""
        self.sums = {
            "loss": mx.array(math.nan if sums["loss"] is None else sums["loss"], mx.float32),
            "weight": mx.array(int(sums["weight"])),
            "tokens": mx.array(int(sums["tokens"])),
        }
        self._earlier_tokens = int(sums["tokens"])  # from another process: excluded from the speed
        self.is_open = self._earlier_tokens > 0
        self._zero_sums_unless_main()

    def restart_clock(self) -> None:
        """Measure time from now on."""
        self._started = time.perf_counter()
        self._paused_seconds = 0.0

    @contextmanager
    def pausing_clock(self) -> Iterator[None]:
        """Exclude the block from the measured time: evaluations and checkpoints are not training.

        If the clock restarts in the block, only the time after the restart is excluded.
        """
        paused_at = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - max(paused_at, self._started)

    def add_micro_batch(self, micro_batch: Mapping[str, mx.array]) -> None:
        """Add the loss, weight and tokens of a micro-batch, lazily."""
        self.sums = {name: total + micro_batch[name] for name, total in self.sums.items()}
        self.is_open = True
        self._iterations += 1

    def sums_for_checkpoint(self) -> dict[str, float]:
        """Return the sums so far, summed over the ranks, for a checkpoint to store."""
        self._sum_ranks()
        sums = {name: to_float(total) for name, total in self.sums.items()}
        self._zero_sums_unless_main()
        return sums

    def close_and_report(self) -> dict[str, Any]:
        """Return the report of this window, and start the next window.

        A window is the steps since the last report. Its speed counts only tokens that this process
        trained on since it began or resumed, and leaves out pauses, such as for evaluations.
        """
        self._sum_ranks()
        mx.eval(self.sums)
        seconds = time.perf_counter() - self._started - self._paused_seconds
        tokens = to_int(self.sums["tokens"])
        report = {
            "loss": self._mean_loss(),
            "tokens": tokens,
            "tokens_per_second": (tokens - self._earlier_tokens) / seconds,
            "iterations_per_second": self._iterations / seconds,
        }
        if not self._world.is_single_process:
            report["gradient_bytes"] = self.gradient_bytes
        self._restart_window()
        return report

    def _sum_ranks(self) -> None:
        """Replace the sums by their totals over all data-parallel processes."""
        self.sums = self._world.sum_scalars_over_ranks(self.sums)

    def _zero_sums_unless_main(self) -> None:
        """Restart at zero on every rank but the main one, which holds the sum over all ranks."""
        if not self._world.is_main:
            self.sums = _zero_sums()

    def _mean_loss(self) -> float:
        """Return the mean loss, divided in float32 on the device.

        A loss that is itself a mean is divided in Python floats, as in mlx-lm.
        """
        if self._is_mean:
            return to_float(self.sums["loss"]) / to_int(self.sums["weight"])
        return to_float(self.sums["loss"] / self.sums["weight"])


def _zero_sums() -> Sums:
    """Return the sums of a report before its first step."""
    return {"loss": mx.array(0.0), "weight": mx.array(0), "tokens": mx.array(0)}


def read_optimizer_metrics(optimizer: Tiered) -> dict[str, Any]:
    """Return what the last step used: learning rate, gradient norm before and after clipping.

    Also the applied and skipped updates of each tier so far.
    """
    norm = optimizer.state[COUNTERS_KEY]["grad_norm"]
    clipped = norm
    if optimizer.max_grad_norm > 0:
        clipped = norm * clip_factor(norm, optimizer.max_grad_norm)
    stats = optimizer.get_tier_stats()
    return {
        "learning_rate": to_float(optimizer.learning_rate),
        "grad_norm": to_float(norm),
        "clipped_grad_norm": to_float(clipped),
        "updates": [tier.updates for tier in stats],
        "skipped": [tier.skipped for tier in stats],
    }


def make_train_info(step: int, iteration: int, record: dict[str, object]) -> dict[str, Any]:
    """Return a report in the form that mlx-lm's on_train_loss_report receives, plus the step."""
    names = ("learning_rate", "iterations_per_second", "tokens_per_second", "trained_tokens")
    info = {name: record[name] for name in (*names, "gradient_bytes") if name in record}
    losses = {"train_loss": record["loss"], "peak_memory": record["peak_memory_gb"]}
    return {"iteration": iteration, "step": step} | losses | info


class Reporter:
    """Reports training, and writes metrics.jsonl: a line for each report, evaluation, or both.

    All ranks call it, because reports sum over the ranks; only the main rank writes.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        """Create it with an empty window of figures."""
        self.setup = setup
        self.window = MetricsWindow(setup.world, is_mean=setup.loss_fn.is_mean)
        self._losses: list[float] = []

    def begin(self, state: TrainingState) -> None:
        """Drop the records after the state's step, and reopen the window of its checkpoint."""
        if self.setup.world.is_main:
            metrics = self.setup.run.metrics
            state.reported = truncate_metrics(metrics, state.step, state.reported)
            self._losses = [r["loss"] for r in read_metrics(metrics) if r.get("loss") is not None]
        if state.open_report:
            self.window.reopen(state.open_report)

    def add_step(self, state: TrainingState, first: int, result: StepResult) -> None:
        """Add a step's micro-batches to the window; `first` is the iteration it began at."""
        self.window.gradient_bytes += result.gradient_bytes
        for micro_batch in result.micro_batches:
            self.window.add_micro_batch(micro_batch)

    def after_step(self, state: TrainingState, evaluation: dict[str, Any], *, is_due: bool) -> None:
        """Report if a report is due or training ended with an open window, and write the record.

        `evaluation` holds the fields of an evaluation at this step, if there was one, for the same
        record.
        """
        is_due = self.window.is_open if state.ended else is_due
        record = self.report(state, state.iteration) if is_due else {}
        if record or evaluation:
            self.write(state, state.iteration, record | evaluation)

    def write(self, state: TrainingState, iteration: int, values: dict[str, object]) -> None:
        """Append a record to metrics.jsonl with step and iteration, on the main rank only."""
        if self.setup.world.is_main:
            self.setup.run.require_lock()
            record = {"step": state.step, "iteration": iteration} | values
            append_metrics(self.setup.run.metrics, record)
        state.reported += 1

    def report(self, state: TrainingState, iteration: int) -> dict[str, Any]:
        """Close the window, pass the report to the callback, and return it for metrics.jsonl."""
        record = self.window.close_and_report() | read_optimizer_metrics(self.setup.optimizer)
        state.train_loss = record["loss"]
        state.trained_tokens += record.pop("tokens")
        self._losses.append(record["loss"])
        warn_of_flat_loss(state, self._losses, self.setup.config.training.flat_loss_reports)
        record["trained_tokens"] = state.trained_tokens
        replayed = self.setup.step_schedule.count_replayed_tokens(iteration)
        if replayed is not None:
            record["replayed_tokens"] = replayed
        record["peak_memory_gb"] = mx.get_peak_memory() / 1e9
        if self.setup.callback is not None:
            self.setup.callback.on_train_loss_report(make_train_info(state.step, iteration, record))
        return record


class Validation:
    """Measures the validation loss, and asks the prompts of `samples` and questions of suites.

    It does not change the model. Its methods raise EvaluationInterrupted if a stop is requested
    meanwhile; the state is then unchanged.
    """

    def __init__(self, setup: TrainingSetup, evaluator: Evaluator) -> None:
        """Create it; `evaluator` computes the losses."""
        self.setup = setup
        self._evaluator = evaluator
        self._targets = setup.step_schedule.validation_targets()

    def after_step(self, state: TrainingState, *, is_due: bool) -> dict[str, object]:
        """Evaluate if it is due, or if training ended with parameters that were not yet evaluated.

        Returns the fields for metrics.jsonl; empty without an evaluation.
        """
        if state.ended:
            is_due = state.evaluated_step != state.step or state.flushed
        return self.evaluate(state, state.iteration) if is_due else {}

    def evaluate(self, state: TrainingState, iteration: int) -> dict[str, Any]:
        """Return the validation loss and the answers to `samples`, as fields for metrics.jsonl."""
        batches = self.setup.step_schedule.validation_batches(iteration)
        losses = {} if batches is None else self._measure_loss(state, iteration, batches)
        if not self.setup.world.is_main:
            return losses
        values = read_parameters(self.setup.parameters)
        return losses | self.setup.samples.answer(self.setup.model, self.setup.parameters, values)

    def _measure_loss(
        self, state: TrainingState, iteration: int, batches: Iterable[MicroBatch]
    ) -> dict[str, Any]:
        """Measure the validation loss, ask the questions, and record both in the state.

        The run offers the adapter of its best step. A step is a candidate for that once every tier
        was updated. Candidates are ranked by their share of wrong answers if `training.select_by`
        names a suite of questions (`wrong`, else 0 for all), then by their loss.

        Returns fields for metrics.jsonl.
        """
        started = time.perf_counter()
        values = read_parameters(self.setup.parameters)
        evaluation = self._evaluator.evaluate(values, batches)
        val_loss = evaluation.mean_loss
        is_candidate = all(tier.updates > 0 for tier in self.setup.optimizer.get_tier_stats())
        training = self.setup.config.training

        def record(state: TrainingState, wrong: float) -> None:
            """Record the evaluation in a state, for the choice of the step and for patience."""
            state.record_evaluation(val_loss, is_candidate=is_candidate, wrong=wrong)
            state.count_without_improvement(
                min_delta=training.min_delta, flushes=self.setup.optimizer.accumulates
            )

        # In a copy, since a stop may interrupt the questions; if answers select, all are asked.
        after = replace(state)
        record(after, wrong=0.0)
        is_last = state.iteration >= self.setup.step_schedule.iterations
        is_last = is_last or after.is_out_of_patience(training.early_stop_patience)
        asked = self._ask_suites(state, values, is_last=is_last)
        name = training.select_by
        record(state, wrong=0.0 if name == "loss" else 1.0 - asked["tasks"][name]["right"])
        if is_candidate and self.setup.step_schedule.offers_best and self.setup.world.is_main:
            self._keep_example_losses(state, evaluation)
        seconds = time.perf_counter() - started
        if self.setup.callback is not None:
            info = {"iteration": iteration, "val_loss": val_loss, "val_time": seconds}
            self.setup.callback.on_val_loss_report(info)
        return {"val_loss": val_loss} | asked

    def _ask_suites(self, state: TrainingState, values: Flat, *, is_last: bool) -> dict[str, Any]:
        """Ask the questions of `training.evaluate_tasks` in the main process; empty if not due.

        Answering is slow, so the questions are not asked at every evaluation, but at least
        STEPS_BETWEEN_QUESTIONS steps apart (less in a short run), and at the last. If the first
        time takes longer than SLOW_SECONDS, only a share of the questions is asked from then on.
        If right answers select the step, all are asked each time.

        values: the parameter values to answer with. is_last: whether training ends with this
        evaluation. Returns fields for metrics.jsonl.
        """
        questions, world = self.setup.questions, self.setup.world
        schedule = self.setup.step_schedule
        if questions is None or not world.is_main:
            return {}
        min_steps = STEPS_BETWEEN_QUESTIONS
        if schedule.steps < min_steps:
            min_steps = schedule.steps // LEAST_ASKINGS
        answers_select = self.setup.config.training.select_by != "loss"
        if answers_select:
            min_steps = 0  # every evaluation needs answers to be compared
        if 0 < state.step < state.asked_step + min_steps and not is_last:
            return {}

        def check_stop() -> None:
            """Interrupt the evaluation on a stop request; with several ranks, never.

            The other ranks are not asking questions, and would wait for this one.
            """
            if world.is_single_process and self._evaluator.is_stop_requested():
                raise EvaluationInterrupted

        share = state.question_share
        asked = questions.ask(self.setup.model, self.setup.parameters, values, check_stop, share)
        seconds = asked.get("task_seconds", 0.0)
        if state.step == 0 and seconds > SLOW_SECONDS and not answers_select:
            state.question_share = SLOW_SECONDS / seconds
        state.asked_step = state.step
        return asked

    def _keep_example_losses(self, state: TrainingState, evaluation: Evaluation) -> None:
        """Append each example's loss at a step that could be offered, for the gate.

        Without per-example losses only the step is recorded, which the gate counts.
        """
        self.setup.run.require_lock()
        contents, losses = None, None
        if evaluation.row_sums is not None and self._targets is not None:
            examples, tokens = self._targets
            is_counted = tokens > 0
            means = evaluation.row_sums[: len(tokens)][is_counted] / tokens[is_counted]
            contents, losses = examples[is_counted].tolist(), finite_or_none(means.tolist())
        step = StepLosses(step=state.step, contents=contents, losses=losses, wrong=state.wrong)
        append_step_losses(self.setup.run.validation_losses, step)


class Saver:
    """Writes checkpoints, and the snapshots that mlx_lm.lora would write to adapter_path.

    All ranks call it; only the main rank writes.
    """

    def __init__(self, setup: TrainingSetup, window: MetricsWindow, evaluator: Evaluator) -> None:
        """Create it; checkpoints also store the open report of `window`."""
        self.setup = setup
        self._window = window
        self._evaluator = evaluator
        self._every = setup.step_schedule.intervals.save
        self._seconds = setup.step_schedule.intervals.save_seconds
        self._saved_at = time.monotonic()
        initial = load_arrays(setup.run.initial / WEIGHTS_NAME)
        self._published_dtypes = {name: array.dtype for name, array in initial.items()}

    def begin(self, state: TrainingState) -> None:
        """Drop recorded losses of later steps, and export the checkpoint's snapshot if it was due.

        The previous process may have been killed between checkpoint and snapshot.
        """
        run = self.setup.run
        if self.setup.world.is_main:
            truncate_step_losses(run.validation_losses, state.step)
            if state.step > 0:
                self._export_checkpoint_if_due(checkpoint_path(run.checkpoints, state.step), state)

    def is_time_to_save(self) -> bool:
        """Whether the minutes of `save_every` have passed; only the main rank decides."""
        if self._seconds is None or not self.setup.world.is_main:
            return False
        return time.monotonic() - self._saved_at >= self._seconds

    def after_step(self, state: TrainingState, *, is_due: bool, is_time: bool) -> bool:
        """Save if it is due, the step is the best so far, or training ended; return whether it did.

        `is_time` is the result of `is_time_to_save`, which all ranks agreed on.
        """
        is_best = self.setup.step_schedule.offers_best and state.best_step == state.step
        if not (state.ended or is_best or is_due or is_time):
            return False
        self.save(state, is_time=is_time)
        return True

    def save(self, state: TrainingState, *, is_time: bool = False) -> None:
        """Write a checkpoint, check that it changed, and remove old checkpoints.

        The adapter is written in the dtypes in which it is published; tensors that are trained in
        float32 and published in fewer bits are written in float32 too (`masters`), to resume from.

        state: the progress to store. is_time: whether a time interval made it due, not a step.
        """
        self._saved_at = time.monotonic()
        # On all processes: it sums over them
        state.open_report = self._window.sums_for_checkpoint()
        setup = self.setup
        if not setup.world.is_main:
            return
        values = read_parameters(setup.parameters)
        adapter = self._cast_to_published_dtypes(values)
        masters = {name: v for name, v in values.items() if v.dtype != adapter[name].dtype}
        recorded = state.to_json() | {  # EVIDENCE_KEYS lists these keys
            "wanted_iterations": setup.config.iters,
            "found": dict(setup.input_digests),
            "tiers": [asdict(stats) for stats in setup.optimizer.get_tier_stats()],
            "logits": finite_or_none(self._evaluator.logits_on_fixed_prompts(adapter)),
        }
        path = checkpoint.write_checkpoint(
            setup.run.checkpoints,
            adapter=adapter,
            masters=masters,
            adapter_config=self._adapter_config(),
            optimizer_state=setup.optimizer.state,
            state=recorded,
            confirm=setup.run.require_lock,
        )
        # Before each tier was updated, an unchanged tensor is no reason to warn.
        if state.step >= max(2, *(tier.frequency for tier in setup.optimizer.tiers)):
            warn_of_unchanged_checkpoint(state, path, setup.run.initial)
        if state.ended and masters:
            warn_of_rounded_updates(state, adapter, masters, setup.run.initial)
        self._export_checkpoint_if_due(path, state, is_time=is_time)
        checkpoint.prune_checkpoints(
            setup.run.checkpoints,
            keep_last=setup.config.training.keep_checkpoints,
            keep_steps=state.steps_to_keep(may_flush=setup.optimizer.accumulates),
        )

    def snapshots_due_before_step(self, first: int, last: int) -> list[int]:
        """Return the iterations within the step [first, last) at which mlx_lm.lora would save."""
        every = self._every
        if self.setup.config.adapter_path is None or every is None:
            return []
        return [done for done in range(first + 1, last) if done % every == 0]

    def export_snapshots(self, iterations: Sequence[int]) -> None:
        """Copy the model's adapter to adapter_path, once for each of these iterations.

        For iterations within a step, called before the step is taken: as in mlx_lm.lora,
        accumulated gradients are not in the snapshot.
        """
        run, adapter_path = self.setup.run, self.setup.config.adapter_path
        if adapter_path is None or not self.setup.world.is_main:
            return
        adapter = self._cast_to_published_dtypes(read_parameters(self.setup.parameters))
        with TemporaryDirectory(dir=run.path, prefix=TEMPORARY_PREFIX) as folder:
            write_adapter(Path(folder), adapter, self._adapter_config())
            for iteration in iterations:
                export_snapshot(Path(folder), adapter_path, run.path, iteration)

    def _export_checkpoint_if_due(
        self, checkpoint_folder: Path, state: TrainingState, *, is_time: bool = False
    ) -> None:
        """Copy a checkpoint to adapter_path if mlx_lm.lora would save at its iteration.

        If `save_every` is in minutes, it is copied when they have passed. Checkpoints written for
        another reason, such as the best one, are not copied.
        """
        adapter_path = self.setup.config.adapter_path
        is_due = is_time or (self._every is not None and state.iteration % self._every == 0)
        if adapter_path is not None and is_due:
            run_dir, iteration = self.setup.run.path, state.iteration
            export_snapshot(checkpoint_folder, adapter_path, run_dir, iteration)

    def _cast_to_published_dtypes(self, values: Flat) -> Flat:
        """Cast trained values to the dtypes in which the adapter is published."""
        return {name: value.astype(self._published_dtypes[name]) for name, value in values.items()}

    def _adapter_config(self) -> dict[str, object]:
        """Read adapter_config.json of the initial adapter."""
        return read_adapter_config(self.setup.run.initial / CONFIG_NAME)
