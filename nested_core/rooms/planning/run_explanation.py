"""What a configuration will do: what is trained, on what, for how long, judged by what.

The data is validated, the adapter is attached and a few steps are trained in a temporary folder, as
a run would; nothing is kept.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE, TaskSection
from nested_core.data.dataset_loading import load_run_data
from nested_core.models.base_model import load_base_model
from nested_core.models.lora_attachment import attach_adapter, load_adapter_tensors
from nested_core.models.parameters import trainable_parameters
from nested_core.models.session import Session
from nested_core.optim.tier_assignment import count_expected_updates
from nested_core.optim.tier_counters import TierStats
from nested_core.pipeline import steps
from nested_core.pipeline.device_lock import OnWait, locking_devices
from nested_core.pipeline.processes import load_services
from nested_core.records.dataset import SplitStats, held_out_split
from nested_core.records.loss_conclusion import MIN_CHANGE, MIN_MARGIN
from nested_core.records.start import read_start
from nested_core.registry.policy import apply_policy
from nested_core.rooms.planning.learning_rate_rule import describe_learning_rate
from nested_core.storage.adapter import WEIGHTS_NAME
from nested_core.storage.run_directory import RunDirectory, open_run
from nested_core.storage.safetensors_files import load_arrays
from nested_core.text.loss_format import NATS_PER_TOKEN
from nested_core.text.stages import stages
from nested_core.text.value_format import format_count, format_passes
from nested_core.training.memory_plan import MemoryPlan
from nested_core.training.trainer import Trainer, make_trainer
from nested_core.training.training_setup import prepare_training


@dataclass(frozen=True)
class RunExplanation:
    """What a run of a configuration will do and cost.

    Attributes:
        config: the configuration with the policy of its registry's name applied.
        tightening: a sentence for each key in which that policy is stricter.
        base_parameters: the base model's parameters as stored; quantised ones count packed.
        tiers: what is trained, tier by tier, with its updates in the whole run.
        splits: what is in each split of the data.
        iterations: micro-batches of the whole run.
        steps: optimizer steps of the whole run.
        epochs: passes over the training data of the whole run.
        validation_examples: examples of an evaluation; 0 without a validation set.
        memory: the predicted peak and the available memory.
        replay: what is replayed, in sentences; empty without replay.
        measured: the measured speed, of the room minutes; None if nothing was measured.
        rate_share: the share of `learning_rate` that it is trained with.
        has_linear_attention: whether modules of `linear_attn`, as in Qwen3.5, are trained.
    """

    config: FineTuneConfig
    tightening: tuple[str, ...]
    base_parameters: int
    tiers: tuple[TierStats, ...]
    splits: dict[str, SplitStats]
    iterations: int
    steps: int
    epochs: float
    validation_examples: int
    memory: MemoryPlan
    replay: tuple[str, ...] = ()
    measured: Any = None
    rate_share: float = 1.0
    has_linear_attention: bool = False

    @property
    def loss_unit(self) -> str:
        """The unit of the loss that is trained with, and that the gate measures."""
        return seams.unit_of_loss(self.config.training.loss)

    def describe(self) -> dict[str, str]:
        """Return sentences by subject, such as `memory`, in the order in which they are shown."""
        return {
            "trained": self._describe_trained(),
            "tiers": self._describe_tiers(),
            "data": self._describe_data(),
            "steps": self._describe_steps(),
            "learning rate": self._describe_learning_rate(),
            "evaluation": self._describe_evaluation(),
            "memory": self.memory.describe().removeprefix("memory: ") + ".",
            **({} if self.measured is None else self.measured.describe()),
            "gate": " ".join(self._describe_gate()),
            "registry": self._describe_registry(),
        }

    def _describe_trained(self) -> str:
        """Return sentences on the adapter: its rank, layers and number of parameters."""
        trained = sum(tier.parameters for tier in self.tiers)
        tensors = sum(tier.tensors for tier in self.tiers)
        lora, config = self.config.lora_parameters, self.config
        shape = f"{config.fine_tune_type} of rank {lora.rank} and scale {lora.scale:g}"
        if config.fine_tune_type == "full":
            shape = "every weight"
        count = format_count(config.num_layers, "layer")
        layers = "all layers" if config.num_layers == -1 else f"the last {count}"
        text = (
            f"{shape} in {layers} of {config.model}: {trained:,} parameters in {tensors} tensors, "
            f"beside {self.base_parameters:,} that stay as they are."
        )
        if self.has_linear_attention:
            text += " With linear_attn, apps of mlx-swift-lm may fail: docs/troubleshooting.md."
        return text

    def _describe_tiers(self) -> str:
        if len(self.tiers) == 1 and self.tiers[0].frequency == 1:
            return "one group of tensors, updated at every step, as with any trainer."
        parts = []
        for tier in self.tiers:
            often = "every step" if tier.frequency == 1 else f"every {tier.frequency} steps"
            parts.append(f"{tier.parameters:,} parameters {often} ({tier.updates} updates)")
        between = self.config.nested.slow_gradients
        rest = "are gathered until then" if between == "accumulate" else "are not computed"
        return f"{'; '.join(parts)}. Gradients of steps between {rest}."

    def _describe_data(self) -> str:
        splits = "; ".join(map(_describe_split, self.splits.values()))
        return ". ".join([splits, *self.replay]) + "."

    def _describe_steps(self) -> str:
        """Return sentences on batches, steps, passes over the data and checkpoints."""
        config = self.config
        accumulation = ""
        interval = config.intervals(self.iterations).save
        saves = config.save_every if interval is None else _format_batches(interval)
        if config.grad_accumulation_steps > 1:
            accumulation = (
                f", {config.grad_accumulation_steps} to an optimizer step: "
                f"{format_count(self.steps, 'step')}"
            )
        unused = "" if self.epochs >= 1 else ", so that some rows are never trained on"
        return (
            f"{format_count(self.iterations, 'batch')} of "
            f"{format_count(config.batch_size, 'example')}{accumulation}; "
            f"{format_passes(self.epochs)} over the training data{unused}. A checkpoint every "
            f"{saves}."
        )

    def _describe_learning_rate(self) -> str:
        """Return sentences on the rate, its schedule, and where it lies in a published sweep."""
        config, share = self.config, self.rate_share
        text = f"{config.learning_rate * share:g}"
        if share != 1:
            text += f" ({share:g} of {config.learning_rate:g}, for it goes on from the champion)"
        schedule = config.lr_schedule
        if schedule is not None:
            text += f", {schedule.name}"
        warmup = config.training.warmup_steps or (schedule.warmup if schedule else 0)
        if warmup:
            first_steps = f"the first {100 * warmup:.3g} % of the steps"
            steps = first_steps if warmup < 1 else format_count(int(warmup), "step")
            text += f", after a warm-up over {steps}"
            if warmup > self.steps:
                text += " (more than the run has: this rate is never reached)"
        if config.training.decay is not None:
            text += ", then falling to a tenth along a cosine"
        if "learning_rate" not in config.model_fields_set:
            text += ", mlx_lm.lora's default, for none is given"
        rule = describe_learning_rate(config, share)
        return f"{text}." if rule is None else f"{text}. {rule[0].upper()}{rule[1:]}."

    def _describe_evaluation(self) -> str:
        """Return a sentence on when the run is evaluated, and which checkpoint is selected."""
        if not self.validation_examples:
            is_off = "valid" in self.splits and self.splits["valid"].rows > 0
            reason = "val_batches is 0" if is_off else "there is no valid split"
            return f"none: {reason}, so the last checkpoint is selected."
        selected = "the checkpoint with the lowest loss"
        if not self.config.offers_best_step:
            selected = "the last step, as mlx_lm.lora does,"
        batches = math.ceil(self.validation_examples / self.config.batch_size)  # not 0
        interval = self.config.intervals(self.iterations, batches).evaluation
        if (suite := self.config.training.select_by) != "loss":
            selected = f"the checkpoint with the most right answers to {suite}"
        return (
            f"every {_format_batches(interval)} on "
            f"{format_count(self.validation_examples, 'example')} of "
            f"{self.splits['valid'].file}; {selected} is selected."
        )

    def _describe_gate(self) -> Iterator[str]:
        """Yield a sentence for each check of the gate that the configuration asks for."""
        gate = self.config.gate_bounds
        yield (
            "rejects an adapter that equals the one it started from, has a tensor that did not "
            "move, is not finite, or changes nothing that the model says. At most "
            f"{gate.max_skipped_share:.2%} of a tensor's updates may be skipped for gradients that "
            "are not finite."
        )
        if gate.min_relative_change:
            share = f"{gate.min_relative_change:g}"
            yield f"At least one tensor must move by {share} of its norm or more."
        if gate.check_fused:
            yield "Its change must survive fusing into the base."
        split = held_out_split(gate.held_out, self.splits)
        if split is not None or gate.held_out not in SPLITS_BY_HELD_OUT_CHOICE:
            file = gate.held_out if split is None else self.splits[split].file
            yield self._describe_loss_bound(file)
            rise = f"{MIN_CHANGE} {self.loss_unit}"
            if self.loss_unit == NATS_PER_TOKEN:
                rise += f" (each expected token {math.e:.1f} times less likely)"
            yield (
                f"The loss of at most {gate.max_harmed_share:.2%} of these examples may rise by "
                f"more than {rise} while few fall by as much."
            )
            if gate.max_kl is not None:
                yield (
                    f"The mean KL divergence from the start may be {gate.max_kl:g} nats/token (0: "
                    f"no prediction moved)."
                )
        else:
            yield "No loss is compared: there is no valid and no test split."
        if gate.max_general_loss_increase is not None:
            yield (
                f"Its loss on {gate.general_data} may not rise significantly, unless the rise is "
                f"certainly within "
                f"{_describe_margin(gate.max_general_loss_increase, NATS_PER_TOKEN)}."
            )
        for task in gate.tasks:
            bounds = ", ".join(self._describe_suite_bounds(task)) or "no threshold"
            yield f"It answers {task.file} ({task.score}): {bounds}."
        broken = "it is rejected" if gate.samples == "fail" else "it is not promoted by itself"
        yield f"Where more than half of its sample answers are broken by training, {broken}."

    def _describe_suite_bounds(self, task: TaskSection) -> Iterator[str]:
        """Yield a part of a sentence for each bound of a suite."""
        if task.min is not None:
            yield f"at least {task.min:.0%} right"
        if task.min_gain is not None:
            yield f"at least {task.min_gain:.0%} more right than before"
        if task.max_drop is None:
            return
        drop = f"at most {task.max_drop:.0%} fewer right than before"
        if self.config.gate.noise == "paired":
            drop += " (losing fewer than 4, and winning none, is never beyond chance)"
        yield drop

    def _describe_loss_bound(self, file: str) -> str:
        """Return sentences on how far the loss on this held-out file may rise."""
        gate = self.config.gate
        increase = gate.max_val_loss_increase
        loss = f"Its loss on held-out examples, {file},"
        if gate.noise == "none":
            return f"{loss} may not rise by more than {increase:.2%}."
        if increase == 0:
            return f"{loss} may not rise significantly."
        return (
            f"{loss} may not rise significantly, unless the rise is certainly within "
            f"{_describe_margin(increase, self.loss_unit)}. If the examples are too few to tell, "
            f"the verdict says so and the adapter passes."
        )

    def _describe_registry(self) -> str:
        """Return sentences on where the adapter is registered, and when it is promoted."""
        registry = self.config.registry
        if registry.path is None:
            return "none; the adapter stays in the run directory."
        policy = {
            "never": "promoted by hand",
            "always": "made champion if it passes the gate",
            "better": "made champion if its loss is significantly lower than the champion's",
            "approve": "made champion once a person approves it",
        }[registry.promote]
        text = f"registered as {registry.name} in {registry.path}, and {policy}."
        return " ".join([text, *(f"But {sentence}." for sentence in self.tightening)])


def explain_run(
    config: FineTuneConfig, on_wait: OnWait | None = None, *, measures_speed: bool = True
) -> RunExplanation:
    """Find out what a run of this configuration will do: its data, tiers, steps and memory.

    Validates the data and attaches the adapter as a run does, in a temporary run directory. Where
    the registry's policy is stricter than `config`, the policy counts.

    measures_speed: whether to train a few steps, to forecast the time; without the optional part
        nested_core/rooms/minutes nothing is measured.
    on_wait: called with a line if another process holds the device.

    Raises what a run raises before it trains: ConfigError, and DatasetError for data with errors.
    """
    load_services(config)
    config, policy_sentences = apply_policy(config)
    measured = None
    with tempfile.TemporaryDirectory(prefix="nested-tune-") as folder, Session() as session:
        run = open_run(Path(folder) / "run", resume=False)
        with run.locked():
            steps.write_run_config(config, run, resume=False)
            stages.info("explain: reading the data")
            report = steps.validate(config, run)
            replay = tuple(steps.describe_earlier_examples(config, run))
            stages.info("explain: attaching the adapter")
            steps.write_initial_adapter_and_tiers(config, run, on_wait, session=session)
            start = read_start(config, run)
            rate_share = 1.0 if start is None else start.rate_share
            if measures_speed and seams.is_there("minutes"):
                from nested_core.rooms.minutes.forecast import measure_run

                config, measured = measure_run(config, run, session, on_wait)
            session.release_base()  # the trainer loads it again: two may not fit into memory
            with locking_devices(on_wait):
                trainer, base_parameters = _make_trainer(config, run)
    schedule = trainer.step_schedule
    return RunExplanation(
        config=config,
        tightening=tuple(policy_sentences),
        base_parameters=base_parameters,
        tiers=tuple(
            replace(tier, updates=count_expected_updates(schedule.steps, tier.frequency))
            for tier in trainer.tier_stats()
        ),
        splits=report.splits,
        iterations=schedule.iterations,
        steps=schedule.steps,
        epochs=schedule.epochs,
        validation_examples=schedule.validation_examples,
        memory=trainer.memory,
        replay=replay,
        measured=measured,
        rate_share=rate_share,
        has_linear_attention=any("linear_attn" in name for name in trainer.setup.parameters),
    )


def _make_trainer(config: FineTuneConfig, run: RunDirectory) -> tuple[Trainer, int]:
    """Build the trainer of the whole run without training; also count the base's parameters."""
    model, tokenizer = load_base_model(config)
    base_parameters = sum(array.size for array in trainable_parameters(model).values())
    _, splits = load_run_data(config, run)
    attach_adapter(model, config)
    load_adapter_tensors(model, load_arrays(run.initial / WEIGHTS_NAME))
    setup = prepare_training(config, run, model, splits, tokenizer=tokenizer)
    return make_trainer(setup), base_parameters


def _describe_margin(increase: float, unit: str) -> str:
    """Describe a relative bound of a loss, and the least rise allowed (`margin_of_loss`)."""
    return f"{increase:.2%} or {MIN_MARGIN:g} {unit}, whichever is more"


def _format_batches(count: int) -> str:
    return "batch" if count == 1 else format_count(count, "batch")


def _describe_split(stats: SplitStats) -> str:
    """Return a part of a sentence: a split's examples and tokens, and how many are too long."""
    text = f"{stats.file} {format_count(stats.rows, 'example')}"
    if stats.tokens is not None:
        text += f", {stats.tokens.total:,} tokens, {stats.tokens.supervised:,} of them trained on"
        if stats.tokens.truncated_rows:
            text += f", {stats.tokens.truncated_rows:,} cut to max_seq_length"
        if stats.tokens.beyond_context:
            text += (
                f", {stats.tokens.beyond_context:,} longer than the {stats.tokens.context:,} "
                f"tokens that the model can see"
            )
    return text
