"""The training loop: step after step, until done or asked to stop.

Before anything looks at the model, what the steps computed is written into it and read back.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.nn as nn

from nested_core.config.schema import FineTuneConfig
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.errors import TrainingStopped
from nested_core.kernels.apply import optimized_layers
from nested_core.models.parameters import configured_refs, read_parameters
from nested_core.optim.clock import COUNTERS, TierStats
from nested_core.optim.gradients import Flat
from nested_core.optim.pytree import apply_flat_updates_to_nested, flatten, verify_updates
from nested_core.optim.tiered import Tiered
from nested_core.optim.tiers import TierMap
from nested_core.storage.checkpoint import Checkpoint
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.batching import make_method
from nested_core.training.callbacks import TrainingCallback
from nested_core.training.distributed import SINGLE_PROCESS, StopVote, World
from nested_core.training.divergence import DivergenceWatch
from nested_core.training.engine import Engine, StepTaken
from nested_core.training.evaluation import EvaluationCut, Evaluator, choose_prompts
from nested_core.training.loss.chunked import rule_for
from nested_core.training.memory.layers import read_footprint
from nested_core.training.memory.plan import plan_memory
from nested_core.training.packing import nested
from nested_core.training.recorder import Recorder, restore_random_key
from nested_core.training.red_flags import flag_updates
from nested_core.training.state import TrainingState
from nested_core.training.verification import UpdateCheck


class Trainer:
    """Trains the adapter that is attached to a model, in a run directory.

    Args:
        config: the resolved configuration.
        run: where metrics and checkpoints go; `initial/` and `tiers.json` are in it.
        model: the base model with the initial adapter attached (`model.attach_adapter`).
        splits: the tokenised data; "train" is needed, "valid" is used where there is one.
        tiers: the tier of every trainable parameter.
        optimizer: initialised with the model's trainable parameters.
        found: digests of what training begins from; every checkpoint carries them to the gate.
        callback: mlx-lm's callback protocol.
        world: the ranks that train together; the one that leads writes to the run directory.
    """

    def __init__(
        self,
        config: FineTuneConfig,
        run: RunDirectory,
        model: nn.Module,
        splits: Mapping[str, TokenizedSplit],
        tiers: TierMap,
        optimizer: Tiered,
        found: Mapping[str, str],
        callback: TrainingCallback | None = None,
        world: World = SINGLE_PROCESS,
    ) -> None:
        self.config, self.run, self.model = config, run, model
        self.tiers, self.optimizer, self.stop_requested = tiers, optimizer, False
        self.state, self.world = TrainingState(), world
        self._refs = configured_refs(config, model)
        self.method = make_method(config, splits, world)
        self._rule = rule_for(model, self._refs, self.method.rule)
        footprint = read_footprint(config, model, self._refs, optimizer, self._rule)
        self.memory = plan_memory(config, footprint, self.method.largest_batch(), world.size)
        self._votes, prompts = StopVote(world, self._is_asked_to_stop), choose_prompts(splits)
        evaluator = Evaluator(model, self._refs, self._rule, self._votes.now, prompts, world)
        parts = self._refs, optimizer, self.method, evaluator
        self._recorder = Recorder(config, run, *parts, found, callback, world)
        self._check = UpdateCheck(model, optimizer, tiers, world, self._write)
        self._divergence = DivergenceWatch(config.training.max_nonfinite_steps)

    @property
    def current_step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @property
    def current_train_loss(self) -> float | None:
        """The training loss of the last report."""
        return self.state.train_loss

    @property
    def current_val_loss(self) -> float | None:
        """The validation loss of the last evaluation."""
        return self.state.val_loss

    @property
    def steps(self) -> int:
        """Optimizer steps to do in all."""
        return self.method.steps

    def tier_stats(self) -> list[TierStats]:
        """What each tier holds, and its updates so far."""
        return self.optimizer.get_tier_stats()

    def stop_training(self) -> None:
        """Ask for a graceful stop: the step ends, a checkpoint is written, train() raises."""
        self.stop_requested = True

    def _is_asked_to_stop(self) -> bool:
        """Whether `stop_training` was called, or another process asked by `nested-tune stop`."""
        return bool(self.stop_requested) or self.run.stop_request.exists()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint: adapter, optimizer, position, best so far and open report."""
        apply_flat_updates_to_nested(self.model, checkpoint.parameters())
        self.optimizer.state = checkpoint.optimizer_state()
        self.optimizer.init(self.model.trainable_parameters())
        self.state = TrainingState.from_json(checkpoint.state)
        is_over = self._is_over()
        self.state.ended = self.state.ended and is_over
        self.state.flushed = self.state.flushed and is_over
        if self.state.random_key is not None:
            restore_random_key(self.state.random_key)

    def train(self) -> TrainingState:
        """Run to the end; raises TrainingStopped where it was asked to stop before.

        Raises TrainingDiverged after `max_nonfinite_steps` non-finite steps in a row.
        """
        self.model.train()
        layers = self.memory.recomputed_layers(self.model)
        reference = self.config.training.reference
        try:
            with optimized_layers(self.model, layers, as_mlx_lm=reference is not None):
                self.world.require_equal(read_parameters(self._refs), self.state.step)
                self._recorder.begin(self.state)
                self._take_steps()
                if not self.state.ended:
                    self._finish()
        except EvaluationCut:
            self.state.ended = False
            self._stop()
        return self.state

    def _take_steps(self) -> None:
        engine, stopping = self._make_engine(), self._votes.now()
        if not self.state.observed and not self._is_over():
            each = self.config.grad_accumulation_steps
            self._observe((self.state.iteration - 1) // each * each, self.state.iteration)
        while not self._is_over():
            if stopping:
                self._stop()
            first = self.state.iteration
            last = min(first + self.config.grad_accumulation_steps, self.method.iterations)
            self._evaluate_within(engine, first, last)
            taken = self._advance(engine, first, last)
            stopping = self._votes.after(taken.votes)
            self._divergence.add(self.state.step, self.optimizer.state[COUNTERS])
            self._verify(engine, taken, must=stopping or self._is_over())
            if not self._is_over():
                self._observe(first, last)
        self._divergence.settle()

    def _evaluate_within(self, engine: Engine, first: int, last: int) -> None:
        """The evaluations before a step; cut in one of them, all are made again on resume."""
        reported = self.state.reported
        try:
            for done in self.method.evaluations_within(first, last):
                self._write(engine)
                self._recorder.observe(self.state, iteration=done, evaluate=True)
        except EvaluationCut:
            self.state.reported = reported
            raise

    def _make_engine(self) -> Engine:
        joins, draws = self.config.fine_tune_type != "full", self.config.lora_parameters.dropout > 0
        parts = self.model, self._refs, self.optimizer, self.tiers, self._rule
        return Engine(*parts, joins=joins, draws=draws, world=self.world)

    def _is_over(self) -> bool:
        patience = self.config.training.early_stop_patience
        is_stale = patience and self.state.evaluations_without_improvement >= patience
        return self.state.iteration >= self.method.iterations or bool(is_stale)

    def _advance(self, engine: Engine, first: int, last: int) -> StepTaken:
        """Take one optimizer step over micro-batches."""
        state, step = self.state, self.state.step + 1
        batches = [self.method.micro_batch(index) for index in range(first, last)]
        complete = self.method.completes(first, last)
        self.method.begin_step(step)
        due, asks = engine.needed(step), self._votes.wish()
        taken, micro = engine.take(batches, due, first, complete=complete, asks=asks)
        if not engine.packing.joins:  # large tensors are not to be held twice
            self._write(engine)
        state.step, state.iteration, state.observed = state.step + complete, last, False
        self._recorder.add(state, first, micro, taken.bytes_sent)
        return taken

    def _write(self, engine: Engine) -> Flat:
        """Write into the model, by name, what the steps so far have computed; return all of it."""
        values = engine.values()
        self.write_back(values)
        return values

    def write_back(self, values: Flat) -> None:
        """Write computed parameters into the model, by dotted name.

        `demo --break-training` replaces this method to show that lost updates are noticed.
        """
        apply_flat_updates_to_nested(self.model, values)

    def _crossed(self, first: int, every: int) -> bool:
        """Whether the last step completed a multiple of `every` iterations."""
        return self.state.iteration // every > first // every

    def _observe(self, first: int, last: int) -> None:
        is_evaluation = self._crossed(first, self.config.steps_per_eval)
        self._recorder.observe(
            self.state,
            report=last in self.method.reports_within(first, last),
            evaluate=self.method.evaluates_after and is_evaluation,
            save=self._crossed(first, self.config.save_every),
        )

    def _verify(self, engine: Engine, taken: StepTaken, *, must: bool) -> None:
        every = (self.config.steps_per_report, self.config.steps_per_eval, self.config.save_every)
        is_time = must or any(self._crossed(taken.first_iteration, n) for n in every)
        self._check.look(engine, taken, self.state, must=is_time)

    def _finish(self) -> None:
        """Apply what is still gathered, evaluate what there is then, and keep it."""
        self._flush()
        is_evaluated = self.state.evaluated_step == self.state.step and not self.state.flushed
        self.state.ended = True
        wants = self.method.evaluates_after and not is_evaluated
        is_open = self._recorder.window.is_open
        self._recorder.observe(self.state, report=is_open, evaluate=wants, save=True)

    def _flush(self) -> None:
        is_open = any(self.state.step % f for f in self.tiers.frequencies)
        is_due = is_open and not self.state.flushed  # it is, where the last evaluation was cut
        if is_due and self.optimizer.gathers:
            before = read_parameters(self._refs)
            updates = flatten(self.optimizer.flush(nested(before)))
            self.write_back(updates)
            flag_updates(self.state, verify_updates(before, updates, self.model), list(updates))
            self.state.note_flush()

    def _stop(self) -> None:
        if self.state.step > 0:
            self._recorder.save(self.state)
        self.run.stop_request.unlink(missing_ok=True)
        raise TrainingStopped(
            f"Training was stopped at step {self.state.step} of {self.method.steps}. Go on with "
            f"the same command, --run-dir {self.run.path} --resume."
        )
