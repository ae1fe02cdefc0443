"""What a run says of itself while it trains: reports, evaluations, metrics.jsonl, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.config.schema import FineTuneConfig
from nested_core.models.parameters import ParameterRefs, read_parameters
from nested_core.optim.tiered import Tiered
from nested_core.storage import checkpoint
from nested_core.storage.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    export_snapshot,
    read_adapter_config,
)
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from nested_core.training.batching import Method
from nested_core.training.callbacks import TrainingCallback
from nested_core.training.distributed import SINGLE_PROCESS, Sums, World
from nested_core.training.evaluation import Evaluator
from nested_core.training.metrics import append_metrics, cut_back, read_metrics
from nested_core.training.red_flags import flag_flat_loss, flag_unchanged_checkpoint
from nested_core.training.state import TrainingState
from nested_core.training.window import Window, optimizer_record, train_info


class Recorder:
    """Reports, evaluates and saves; it reads the model and the optimizer and changes neither.

    Among ranks all of them go through it, for they add up what is reported; one writes.
    """

    def __init__(
        self,
        config: FineTuneConfig,
        run: RunDirectory,
        refs: ParameterRefs,
        optimizer: Tiered,
        method: Method,
        evaluator: Evaluator,
        found: Mapping[str, str],
        callback: TrainingCallback | None,
        world: World = SINGLE_PROCESS,
    ) -> None:
        self.config, self.run, self.callback = config, run, callback
        self.window, self._world = Window(of_means=method.rule.is_mean, world=world), world
        self._refs, self._optimizer = refs, optimizer
        self._method, self._evaluator = method, evaluator
        self._found = dict(found)
        initial = load_arrays(run.initial / WEIGHTS_NAME)
        self._published = {name: array.dtype for name, array in initial.items()}
        self._losses: list[float] = []

    def begin(self, state: TrainingState) -> None:
        """Open metrics.jsonl: at the state's step on resume, else with step 0, before training."""
        is_resumed = state.step > 0
        if self._world.is_main:
            state.reported = cut_back(self.run.metrics, state.step, state.reported)
            records = read_metrics(self.run.metrics)
            self._losses = [r["loss"] for r in records if r.get("loss") is not None]
        if state.open_report:
            self.window.reopen(state.open_report)
        if not is_resumed:
            self._append(state, {"iteration": 0} | self._evaluate(state, 0))
        self.window.restart_clock()

    def add(self, state: TrainingState, first: int, micro: Sequence[Sums], sent: int = 0) -> None:
        """Add a step's micro-batches, with the reports that fall between them.

        `sent` is the bytes of gradients that the step sent to the other ranks.
        """
        self.window.count_bytes(sent)
        last = first + len(micro)
        within = set(self._method.reports_within(first, last)) - {last}
        for index, sums in enumerate(micro):
            self.window.add(sums)
            if first + index + 1 in within:
                self.observe(state, iteration=first + index + 1, report=True)

    def observe(
        self,
        state: TrainingState,
        *,
        iteration: int | None = None,
        report: bool = False,
        evaluate: bool = False,
        save: bool = False,
    ) -> None:
        """What is due now: one line of metrics, a checkpoint of this step or of the best.

        Raises EvaluationCut where a stop was asked for in the evaluation; nothing has changed then.
        """
        done = state.iteration if iteration is None else iteration
        with self.window.paused():
            evaluation = self._evaluate(state, done) if evaluate else {}
        with self.window.paused():
            state.observed = True
            record = (self._report(state, done) if report else {}) | evaluation
            if record:
                self._append(state, {"iteration": done} | record)
            is_best = evaluate and self._method.offers_best and state.best_step == state.step
            if save or is_best:
                self.save(state)

    def _append(self, state: TrainingState, record: dict[str, Any]) -> None:
        if self._world.is_main:
            append_metrics(self.run.metrics, {"step": state.step} | record)
        state.reported += 1

    def _report(self, state: TrainingState, iteration: int) -> dict[str, Any]:
        record = self.window.close() | optimizer_record(self._optimizer)
        state.train_loss = record["loss"]
        state.trained_tokens += record.pop("tokens")
        self._losses.append(record["loss"])
        flag_flat_loss(state, self._losses, self.config.training.flat_loss_reports)
        record["trained_tokens"] = state.trained_tokens
        record["peak_memory_gb"] = mx.get_peak_memory() / 1e9
        if self.callback is not None:
            self.callback.on_train_loss_report(train_info(state.step, iteration, record))
        return record

    def _evaluate(self, state: TrainingState, iteration: int) -> dict[str, Any]:
        batches = self._method.validation_batches(iteration)
        if batches is None:
            return {}
        began = time.perf_counter()
        val_loss = self._evaluator.loss(read_parameters(self._refs), batches)
        is_candidate = all(tier.updates > 0 for tier in self._optimizer.get_tier_stats())
        state.record_evaluation(
            val_loss, is_candidate=is_candidate, min_delta=self.config.training.min_delta
        )
        seconds = time.perf_counter() - began
        if self.callback is not None:
            info = {"iteration": iteration, "val_loss": val_loss, "val_time": seconds}
            self.callback.on_val_loss_report(info)
        return {"val_loss": val_loss}

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint and remove those that are no longer to be kept."""
        state.open_report = self.window.open_sums()
        if not self._world.is_main:
            return
        state.random_key = random_key() if self._method.draws_in_sequence else None
        tiers = [asdict(stats) for stats in self._optimizer.get_tier_stats()]
        wanted = {"wanted_iterations": self.config.iters, "found": self._found, "tiers": tiers}
        held = read_parameters(self._refs)
        adapter = {name: value.astype(self._published[name]) for name, value in held.items()}
        masters = {n: v for n, v in held.items() if v.dtype != self._published[n]}
        wanted["logits"] = finite_or_none(self._evaluator.fixed_logits(adapter))
        path = checkpoint.write_checkpoint(
            self.run.checkpoints,
            adapter=adapter,
            masters=masters,
            adapter_config=read_adapter_config(self.run.initial / CONFIG_NAME),
            optimizer_state=self._optimizer.state,
            state=state.to_json() | wanted,
        )
        if state.step >= max(2, *(tier.frequency for tier in self._optimizer.tiers)):
            flag_unchanged_checkpoint(state, path, self.run.initial)
        if self.config.adapter_path is not None:
            export_snapshot(path, Path(self.config.adapter_path), state.iteration)
        checkpoint.prune_checkpoints(
            self.run.checkpoints,
            keep_last=self.config.training.keep_checkpoints,
            keep_steps=[state.best_step] if state.best_step is not None else [],
        )


def random_key() -> list[int]:
    """The key of MLX's next draw in this thread, as two 32-bit words."""
    state: Any = mx.random.state
    words: list[int] = np.array(state[0]).tolist()
    return words


def restore_random_key(words: Sequence[int]) -> None:
    """Go on with the draws after a key; seeding with its 64 bits gives the key itself."""
    mx.random.seed((words[0] << 32) | words[1])
