"""The training loop: step after step, until the run is over or a stop is requested.

Steps advance packed arrays. Before a report, an evaluation or a checkpoint reads the model, the
parameters are written into it by name and read back to check that they arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import mlx.core as mx

from nested_core import seams
from nested_core.config.schema import Due
from nested_core.errors import DamagedError, DatasetError, TrainingStopped, go_on_with, shorten
from nested_core.kernels.device_operations import device_operations
from nested_core.kernels.optimized_model import using_optimized_layers
from nested_core.models.parameters import read_parameters
from nested_core.optim.gradients import Flat
from nested_core.optim.named_updates import apply_flat_updates_to_nested, flatten, verify_updates
from nested_core.optim.tier_counters import COUNTERS_KEY, TierStats
from nested_core.storage.checkpoint import Checkpoint, latest_checkpoint
from nested_core.training.due_parts import Reporter, Saver, Validation
from nested_core.training.evaluation import EvaluationInterrupted, Evaluator
from nested_core.training.memory_plan import plan_memory
from nested_core.training.nonfinite_watch import NonfiniteStepWatch
from nested_core.training.parameter_packing import unflatten_names
from nested_core.training.schedule.step_schedule import REFERENCE_KEY
from nested_core.training.train_step import StepResult, TrainStep
from nested_core.training.training_checks import UpdateCheck, warn_of_lost_updates
from nested_core.training.training_setup import TrainingSetup
from nested_core.training.training_state import TrainingState, require_whole_state

SECONDS_BEFORE_END = 20.0  # the longest time that a new process takes for its imports
NAMES_OF_DIGESTED_INPUTS = {
    "initial": "initial/",
    "initial_files": "its files",
    "tiers": "tiers.json",
    "base": "the base",
    "data": "the data",
    "tokenizer": "the base's tokenizer or chat template",
    "replay": "replay.json",
    "start": "start.json",
}


class Trainer:
    """Trains the adapter that is attached to a model, in a run directory.

    Attributes:
        packs_adapters: whether an adapter's tensors are packed by tier; a subclass may say no.
        state: the progress so far.
        memory: the forecast of peak memory, and the layers that are recomputed to save memory.
        on_step: called after each step with the step and the steps of the whole run.
        on_near_end: called once, after a step, when some SECONDS_BEFORE_END of training are left.
        evaluation_peak: MLX's peak memory in bytes up to the end of the first evaluation.
        stop_requested: ends training after the current step; interrupts an evaluation at once.
        stop_after_step: ends training like a stop after this step and its evaluation.
        is_out_of_time: ends training after the current step, as early stopping does.
    """

    # The parts that act at some steps; subclasses may replace them
    reporter_class: type[Reporter] = Reporter
    validation_class: type[Validation] = Validation
    saver_class: type[Saver] = Saver
    packs_adapters = True

    def __init__(self, setup: TrainingSetup) -> None:
        """Create the parts of the training loop; nothing is read or trained yet.

        Subclasses replace the classes of the reporter, the validation and the saver.
        """
        # What is trained, and how
        self.setup = setup
        self.config = setup.config
        self.model = setup.model
        self.optimizer = setup.optimizer
        self.step_schedule = setup.step_schedule
        self.world = setup.world
        self.memory = plan_memory(setup)

        # Progress, which checkpoints store
        self.state = TrainingState()
        self.evaluation_peak = 0

        # Callbacks and requests
        self.on_step: Callable[[int, int], None] | None = None  # (step, steps), after each step
        self.after_step: Callable[[Trainer], None] | None = None  # may end training
        self.on_near_end: Callable[[], None] | None = None  # once, shortly before the last step
        self.stop_after_step: int | None = None
        self.stop_requested = False  # set from outside, such as by a signal
        self.is_out_of_time = False  # set from outside: training ends after this step

        # Evaluation, reports and checks
        evaluator = Evaluator(
            setup.model,
            setup.parameters,
            setup.loss_fn,
            prompts=setup.prompts,
            is_stop_requested=self._any_rank_requests_stop,
            world=setup.world,
        )
        self._reporter = self.reporter_class(setup)
        self._validation = self.validation_class(setup, evaluator)
        self._saver = self.saver_class(setup, self._reporter.window, evaluator)
        self._update_check = UpdateCheck(setup)
        self._divergence_watch = NonfiniteStepWatch(
            setup.config.training.max_nonfinite_steps, setup.config.learning_rate
        )

    @property
    def current_step(self) -> int:
        """The number of optimizer steps done."""
        return self.state.step

    @property
    def steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        return self.step_schedule.steps

    def tier_stats(self) -> list[TierStats]:
        """Return the size and the update counts of each tier."""
        return self.optimizer.get_tier_stats()

    def stop_training(self) -> None:
        """Request a stop: the current step ends, a checkpoint is written, train() raises."""
        self.stop_requested = True

    def resume(self) -> None:
        """Continue from the run's last sound checkpoint; without a checkpoint, start at step 0.

        Raises DamagedError or DatasetError if an input of the run has changed since it began, and
        DamagedError if the checkpoint's state is incomplete.
        """
        checkpoint = latest_checkpoint(self.setup.run.checkpoints)
        if checkpoint is not None:
            require_whole_state(checkpoint.state, checkpoint.path)
            self._refuse_changed_inputs(checkpoint.state["found"])
            self._restore_checkpoint(checkpoint)

    def _refuse_changed_inputs(self, recorded: Mapping[str, str]) -> None:
        """Raise an error if a digest recorded in the checkpoint differs from today's input.

        DatasetError if only the data changed, else DamagedError.
        """
        digests = self.setup.input_digests
        changed = [name for name in recorded if recorded[name] != digests.get(name)]
        if not changed:
            return
        names = " and ".join(NAMES_OF_DIGESTED_INPUTS[name] for name in changed)
        message = (
            f"{self.setup.run.path} cannot be resumed: {names} changed since it began. Bring "
            f"back what was there, or start a new run."
        )
        raise DatasetError(message) if changed == ["data"] else DamagedError(message)

    def _restore_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Load adapter, optimizer and training state from a checkpoint.

        A run that ended after all its iterations, or in time for its verdict, goes on if more are
        configured now.
        """
        apply_flat_updates_to_nested(self.model, checkpoint.parameters())
        self.optimizer.state = checkpoint.optimizer_state()
        self.optimizer.init(self.model.trainable_parameters())
        self.state = TrainingState.from_json(checkpoint.state)
        if self.state.ended in ("iterations", "time"):
            self.state.ended = None
            self.state.ended = self._find_end()
            self.state.flushed = self.state.flushed and self._is_over()

    def train(self) -> TrainingState:
        """Train to the end of the run and return the final state.

        Raises TrainingStopped if a stop is requested before the end, TrainingDiverged after
        `max_nonfinite_steps` steps in a row whose gradients are not finite.
        """
        if not self.setup.run.trial_mark.exists():  # the steps of a trial only tell the time
            self.setup.loss_fn.begin()
        try:
            self.world.watch.allow_longer()  # the first step compiles: that is no hanging process
            with self.using_training_layers():
                self.world.require_equal_on_ranks(
                    read_parameters(self.setup.parameters), self.state.step
                )
                self._begin()
                self._train_steps()
                if self.state.ended is None:
                    self.state.ended = self._find_end()  # a flush changes what it follows from
                    self._apply_remaining_gradients()
                    self.state.observed = False
                if not self.state.observed:
                    self._observe(Due())
        except EvaluationInterrupted:  # by a stop request: a resumed run evaluates again
            self._save_and_raise_stopped()
        except RuntimeError as error:  # MLX's, where the same signal ended its compiler
            if not (self.world.is_single_process and self._is_stop_requested()):
                raise
            self._raise_stopped_in_step(error)
        finally:
            self.world.watch.end()
        return self.state

    def _begin(self) -> None:
        """Prepare metrics and checkpoint files for the state's step, and evaluate before step 1."""
        self._reporter.begin(self.state)
        self._saver.begin(self.state)
        if self.state.step == 0:
            self._reporter.write(self.state, 0, self._validation.evaluate(self.state, 0))
        self._reporter.window.restart_clock()
        self.evaluation_peak = mx.get_peak_memory()

    def using_training_layers(self) -> AbstractContextManager[None]:
        """Put the model into training mode and, within the block, optimize its layers for training.

        Some layers recompute their activations, as the memory plan says.
        """
        self.model.train()
        return using_optimized_layers(self.model, self.memory.layers_to_recompute(self.model))

    def describe_layers(self) -> str:
        """Say in one line which of the model's layers are ours, and why others are not."""
        return device_operations().describe_layers(self.model)

    def _train_steps(self) -> None:
        """Take the run's remaining steps, each with what is due before and after it.

        Due are checks, reports, evaluations and checkpoints, by their intervals. Saves a checkpoint
        and raises TrainingStopped if a stop was requested.
        """
        micro_batches = self.config.grad_accumulation_steps
        train_step = self.make_train_step()
        must_stop = self._any_rank_requests_stop() or self._is_at_last_step()
        near_end = _NearEnd(self.state.step, self.steps, self.on_near_end)
        if not self.state.observed and not self._is_over():  # the last evaluation was interrupted
            last = self.state.iteration
            self._observe(self.step_schedule.intervals.due(last - micro_batches, last))
        while not self._is_over():
            if must_stop:
                self._save_and_raise_stopped()
            first = self.state.iteration
            last = min(first + micro_batches, self.step_schedule.iterations)
            self._observe_before_step(train_step, first, last)
            result = self._take_step(train_step, first, last)
            if self.on_step is not None:
                self.on_step(self.state.step, self.steps)
            if self.after_step is not None:
                self.after_step(self)
            near_end.after_step(self.state.step)
            # All ranks must act on a request after the same step: the requests were summed in it.
            must_stop, must_save = self.world.requests_after_step(
                result.requests, self._own_requests
            )
            must_stop = must_stop or self._is_at_last_step()
            self.world.watch.after_step()
            self._divergence_watch.add_step(self.state.step, self.optimizer.state[COUNTERS_KEY])
            due = self.step_schedule.intervals.due(first, last)
            is_read = must_stop or must_save or self._is_over() or any(due)
            self._check_updates(train_step, result, is_read=is_read)
            if not self._is_over():
                self._observe(due, must_save=must_save)
        self._divergence_watch.finish()

    def make_train_step(self) -> TrainStep:
        """Create the TrainStep, which starts from the model's current parameters."""
        return TrainStep(
            model=self.model,
            parameters=self.setup.parameters,
            optimizer=self.optimizer,
            tiers=self.setup.tiers,
            loss_fn=self.setup.loss_fn,
            pack_by_tier=self.packs_adapters and self.config.fine_tune_type != "full",
            uses_dropout=self.config.lora_parameters.dropout > 0,
            world=self.world,
        )

    def _take_step(self, train_step: TrainStep, first: int, last: int) -> StepResult:
        """Take one optimizer step over the micro-batches [first, last), and advance the state.

        Returns arrays that the device may still be computing. If the run's last micro-batches do
        not fill a step, their gradients are dropped and the step is not counted.
        """
        step = self.state.step + 1
        batches = map(self.step_schedule.micro_batch, range(first, last))
        is_complete = self.step_schedule.is_complete_step(first, last)
        self.step_schedule.seed_step(step)
        due = train_step.needed_tiers(step)
        if due not in train_step.compiled:  # compiling takes long: that is no hanging process
            self.world.watch.allow_longer()
        # Requests to stop or save travel with the gradients, so that all processes see the same.
        requests = self.world.requests_to_send(self._own_requests)
        result = train_step.run(batches, due, is_complete=is_complete, requests=requests)
        if not train_step.packed.packing.by_tier:  # or large tensors would be in memory twice
            self._sync_model_and_optimizer(train_step)
        if is_complete:
            self.state.step = step
        self.state.iteration = last
        self.state.observed = False  # the evaluation after this step is still to be done
        self._reporter.add_step(self.state, first, result)
        return result

    def _sync_model_and_optimizer(self, train_step: TrainStep) -> Flat:
        """Write the packed parameters and optimizer state into the model and the optimizer by name.

        Returns the parameters by name.
        """
        values = train_step.packed.unpack()
        self.write_parameters_into_model(values)
        return values

    def write_parameters_into_model(self, values: Flat) -> None:
        """Write computed parameters into the model, by dotted name.

        `demo --break-training` replaces this method to show that lost updates are noticed.
        """
        apply_flat_updates_to_nested(self.model, values)

    def _check_updates(self, train_step: TrainStep, result: StepResult, *, is_read: bool) -> None:
        """Write the step's parameters into the model, and check that they arrived.

        Skipped if nothing reads the model after this step (`is_read`) and an update of the same
        tiers was already checked. Raises TrainingProcessesDiffer if the ranks are no longer equal.
        """
        if not is_read and result.due in self._update_check.checked_due:
            return
        written = self._sync_model_and_optimizer(train_step)
        self.world.require_equal_on_ranks(train_step.packed.arrays(), self.state.step)
        if result.updates:
            packing = train_step.packed.packing
            self._update_check.check(self.state, result, packing=packing, written=written)

    def _observe_before_step(self, train_step: TrainStep, first: int, last: int) -> None:
        """Export the snapshots that are due within the step [first, last), before it is applied."""
        if snapshots := self._saver.snapshots_due_before_step(first, last):
            self._sync_model_and_optimizer(train_step)
            self._saver.export_snapshots(snapshots)

    def _observe(self, due: Due, *, must_save: bool = False) -> None:
        """Evaluate, report and save what is due after a step, or at the end of training.

        `must_save`: the minutes between two checkpoints have passed.
        """
        with self._reporter.window.pausing_clock():
            evaluation = self._validation.after_step(self.state, is_due=due.evaluation)
        with self._reporter.window.pausing_clock():
            self.state.observed = True
            self._reporter.after_step(self.state, evaluation, is_due=due.report)
            if self._saver.after_step(self.state, is_due=due.save, is_time=must_save):
                self.world.watch.allow_longer()

    def _find_end(self) -> str | None:
        """Return why training is over: iterations, time or patience; None while it is not."""
        if self.state.ended is not None:
            return self.state.ended
        if self.state.iteration >= self.step_schedule.iterations:
            return "iterations"
        if self.is_out_of_time:
            return "time"
        patience = self.config.training.early_stop_patience
        return "patience" if self.state.is_out_of_patience(patience) else None

    def _is_over(self) -> bool:
        """Whether training is over."""
        return self._find_end() is not None

    def _apply_remaining_gradients(self) -> None:
        """Apply gradients that slow tiers have accumulated since they were last due (a flush)."""
        has_open_chunk = any(self.state.step % f for f in self.setup.tiers.frequencies)
        if not has_open_chunk or self.state.flushed:  # already flushed, but not yet evaluated
            return
        if self.optimizer.accumulates:
            # Outside of the compiled step, so the update is checked here as `_check_updates` does.
            before = read_parameters(self.setup.parameters)
            updates = flatten(self.optimizer.flush(unflatten_names(before)))
            self.write_parameters_into_model(updates)
            report = verify_updates(before, updates, self.model)
            warn_of_lost_updates(self.state, report, idle=list(updates))
            self.state.record_gradient_flush()

    def _is_at_last_step(self) -> bool:
        """Whether `stop_after_step` is reached: training ends after this step's evaluation."""
        return self.stop_after_step is not None and self.state.step >= self.stop_after_step

    def _is_stop_requested(self) -> bool:
        """Whether this rank should stop, because of `stop_training` or `nested-tune stop`."""
        return bool(self.stop_requested) or self.setup.run.stop_request.exists()

    def _any_rank_requests_stop(self) -> bool:
        """Whether any rank should stop. Waits for all ranks; called in evaluations."""
        self.world.watch.allow_longer()
        return self.world.any_rank(self._is_stop_requested())

    def _own_requests(self) -> tuple[bool, bool]:
        """Return whether this rank should stop, and whether it is time for a checkpoint."""
        return self._is_stop_requested(), self._saver.is_time_to_save()

    def _save_and_raise_stopped(self) -> None:
        """Save a checkpoint, remove the stop request, and raise TrainingStopped."""
        if self.state.step > 0:
            self._saver.save(self.state)
        raise self._make_stopped(self.state.step)

    def _raise_stopped_in_step(self, error: RuntimeError) -> None:
        """Raise TrainingStopped at the newest checkpoint: what the step left is not to be kept."""
        newest = latest_checkpoint(self.setup.run.checkpoints)
        why = f"What came after it could not be finished: {shorten(error, 300)}."
        raise self._make_stopped(0 if newest is None else newest.step, why) from error

    def _make_stopped(self, step: int, why: str = "") -> TrainingStopped:
        """Remove the stop request; the error that says at which step a resumed run goes on."""
        self.setup.run.stop_request.unlink(missing_ok=True)
        words = [f"Training was stopped at step {step} of {self.steps}."]
        words += ["There is no checkpoint yet: it begins at step 1."] if step == 0 else []
        words += [why] if why else []
        return TrainingStopped(" ".join(words), advice=go_on_with(self.setup.run.path))


@dataclass(frozen=True)
class ReferenceTrainer:
    """What trains a run under `training.reference`."""

    make: Callable[[TrainingSetup], Trainer]


def make_trainer(setup: TrainingSetup) -> Trainer:
    """Return the configured trainer; under `training.reference` that of the room reference.

    Raises ConfigError if the room is not installed.
    """
    if setup.config.training.reference is None:
        return Trainer(setup)
    return seams.load_only(ReferenceTrainer, REFERENCE_KEY).make(setup)


class _NearEnd:
    """Calls a function once, when an estimated SECONDS_BEFORE_END of training are left."""

    def __init__(self, first: int, steps: int, callback: Callable[[], None] | None) -> None:
        """Create it; `first` is the step that training starts at, `steps` the last step."""
        self._first = first
        self._steps = steps
        self._callback = callback
        self._started = time.monotonic()

    def after_step(self, step: int) -> None:
        """Estimate the time left from the time per step so far, evaluations included."""
        if self._callback is None or step <= self._first:
            return
        seconds_a_step = (time.monotonic() - self._started) / (step - self._first)
        if (self._steps - step) * seconds_a_step <= SECONDS_BEFORE_END:
            self._callback()
            self._callback = None
