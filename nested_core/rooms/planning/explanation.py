"""What a run will do, in words: what is trained, on what, for how long, judged by what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nested_core import seams
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE, TaskSection
from nested_core.records.dataset import SplitStats, held_out_split
from nested_core.records.loss_conclusion import MIN_CHANGE, MIN_MARGIN
from nested_core.rooms.planning.learning_rate_rule import describe_learning_rate
from nested_core.rooms.planning.run_explanation import RunExplanation
from nested_core.text.loss_format import NATS_PER_TOKEN
from nested_core.text.value_format import format_count, format_passes


@dataclass(frozen=True)
class RunInWords:
    """What a run will do and cost, subject by subject."""

    run: RunExplanation

    @property
    def loss_unit(self) -> str:
        """The unit of the loss that is trained with, and that the gate measures."""
        return seams.unit_of_loss(self.run.config.training.loss)

    def describe(self) -> dict[str, str]:
        """Return sentences by subject, such as `memory`, in the order in which they are shown."""
        return {
            "trained": self._describe_trained(),
            "tiers": self._describe_tiers(),
            "data": self._describe_data(),
            "steps": self._describe_steps(),
            "learning rate": self._describe_learning_rate(),
            "evaluation": self._describe_evaluation(),
            "memory": self.run.memory.describe().removeprefix("memory: ") + ".",
            **({} if self.run.measured is None else self.run.measured.describe()),
            "gate": " ".join(self._describe_gate()),
            "registry": self._describe_registry(),
        }

    def _describe_trained(self) -> str:
        """Return sentences on the adapter: its rank, layers and number of parameters."""
        trained = sum(tier.parameters for tier in self.run.tiers)
        tensors = sum(tier.tensors for tier in self.run.tiers)
        lora, config = self.run.config.lora_parameters, self.run.config
        shape = f"{config.fine_tune_type} of rank {lora.rank} and scale {lora.scale:g}"
        if config.fine_tune_type == "full":
            shape = "every weight"
        count = format_count(config.num_layers, "layer")
        layers = "all layers" if config.num_layers == -1 else f"the last {count}"
        text = (
            f"{shape} in {layers} of {config.model}: {trained:,} parameters in {tensors} tensors, "
            f"beside {self.run.base_parameters:,} that stay as they are."
        )
        if self.run.has_linear_attention:
            text += " With linear_attn, apps of mlx-swift-lm may fail: docs/troubleshooting.md."
        return text

    def _describe_tiers(self) -> str:
        if len(self.run.tiers) == 1 and self.run.tiers[0].frequency == 1:
            return "one group of tensors, updated at every step, as with any trainer."
        parts = []
        for tier in self.run.tiers:
            often = "every step" if tier.frequency == 1 else f"every {tier.frequency} steps"
            parts.append(f"{tier.parameters:,} parameters {often} ({tier.updates} updates)")
        between = self.run.config.nested.slow_gradients
        rest = "are gathered until then" if between == "accumulate" else "are not computed"
        return f"{'; '.join(parts)}. Gradients of steps between {rest}."

    def _describe_data(self) -> str:
        splits = "; ".join(map(_describe_split, self.run.splits.values()))
        return ". ".join([splits, *self.run.replay]) + "."

    def _describe_steps(self) -> str:
        """Return sentences on batches, steps, passes over the data and checkpoints."""
        config = self.run.config
        accumulation = ""
        interval = config.intervals(self.run.iterations).save
        saves = config.save_every if interval is None else _format_batches(interval)
        if config.grad_accumulation_steps > 1:
            accumulation = (
                f", {config.grad_accumulation_steps} to an optimizer step: "
                f"{format_count(self.run.steps, 'step')}"
            )
        unused = "" if self.run.epochs >= 1 else ", so that some rows are never trained on"
        return (
            f"{format_count(self.run.iterations, 'batch')} of "
            f"{format_count(config.batch_size, 'example')}{accumulation}; "
            f"{format_passes(self.run.epochs)} over the training data{unused}. A checkpoint every "
            f"{saves}."
        )

    def _describe_learning_rate(self) -> str:
        """Return sentences on the rate, its schedule, and where it lies in a published sweep."""
        config, share = self.run.config, self.run.rate_share
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
            if warmup > self.run.steps:
                text += " (more than the run has: this rate is never reached)"
        if config.training.decay is not None:
            text += ", then falling to a tenth along a cosine"
        if "learning_rate" not in config.model_fields_set:
            text += ", mlx_lm.lora's default, for none is given"
        rule = describe_learning_rate(config, share)
        return f"{text}." if rule is None else f"{text}. {rule[0].upper()}{rule[1:]}."

    def _describe_evaluation(self) -> str:
        """Return a sentence on when the run is evaluated, and which checkpoint is selected."""
        if not self.run.validation_examples:
            is_off = "valid" in self.run.splits and self.run.splits["valid"].rows > 0
            reason = "val_batches is 0" if is_off else "there is no valid split"
            return f"none: {reason}, so the last checkpoint is selected."
        selected = "the checkpoint with the lowest loss"
        if not self.run.config.offers_best_step:
            selected = "the last step, as mlx_lm.lora does,"
        batches = math.ceil(self.run.validation_examples / self.run.config.batch_size)  # not 0
        interval = self.run.config.intervals(self.run.iterations, batches).evaluation
        if (suite := self.run.config.training.select_by) != "loss":
            selected = f"the checkpoint with the most right answers to {suite}"
        return (
            f"every {_format_batches(interval)} on "
            f"{format_count(self.run.validation_examples, 'example')} of "
            f"{self.run.splits['valid'].file}; {selected} is selected."
        )

    def _describe_gate(self) -> Iterator[str]:
        """Yield a sentence for each check of the gate that the configuration asks for."""
        gate = self.run.config.gate_bounds
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
        split = held_out_split(gate.held_out, self.run.splits)
        if split is not None or gate.held_out not in SPLITS_BY_HELD_OUT_CHOICE:
            file = gate.held_out if split is None else self.run.splits[split].file
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
        if self.run.config.gate.noise == "paired":
            drop += " (losing fewer than 4, and winning none, is never beyond chance)"
        yield drop

    def _describe_loss_bound(self, file: str) -> str:
        """Return sentences on how far the loss on this held-out file may rise."""
        gate = self.run.config.gate
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
        registry = self.run.config.registry
        if registry.path is None:
            return "none; the adapter stays in the run directory."
        policy = {
            "never": "promoted by hand",
            "always": "made champion if it passes the gate",
            "better": "made champion if its loss is significantly lower than the champion's",
            "approve": "made champion once a person approves it",
        }[registry.promote]
        text = f"registered as {registry.name} in {registry.path}, and {policy}."
        return " ".join([text, *(f"But {sentence}." for sentence in self.run.tightening)])


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
