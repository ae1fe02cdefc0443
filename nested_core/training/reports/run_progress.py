"""The progress of a run, read from its directory, as every live display shows it.

plan.json and metrics.jsonl hold how far training is; nothing here waits or prints. A display calls
`read` now and then, from a thread of its own, and shows what the `describe_` methods return.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from nested_core.errors import DamagedError
from nested_core.records.metrics import describe_tasks, parse_record
from nested_core.records.plan import TrainingPlan, read_plan
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import open_regular
from nested_core.storage.validation_losses import read_step_losses
from nested_core.text.duration_format import format_clock
from nested_core.text.foreign_text import escape
from nested_core.text.loss_format import format_loss
from nested_core.text.value_format import format_count, format_speed


@dataclass
class RunProgress:
    """The progress of a run, as far as it was read from the run's directory.

    run: the run's directory.
    plan: what the run set out to do; None for a run of an earlier release.
    records: the records of metrics.jsonl so far.
    stages: the stages after training, such as the gate's, and when each began, in seconds.
    outcome: how the run ended, in sentences; empty until then.
    seconds: the time since training began in this process.
    reported_at: `seconds` when the last record was read.
    first_report: iteration and `seconds` of the first training report that was read.
    """

    run: RunDirectory
    plan: TrainingPlan | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    stages: list[tuple[str, float]] = field(default_factory=list)
    outcome: list[str] = field(default_factory=list)
    seconds: float = 0.0
    reported_at: float = 0.0
    first_report: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        """Record the plan.json that exists now, to notice when training replaces it."""
        # Training has begun once plan.json is another file than now. A run that is cut writes it
        # again.
        self._plan_inode = self._inode_of_plan()
        self._began_at: float | None = None

        # The position up to which metrics.jsonl was read
        self._inode = -1
        self._offset = 0

    @property
    def has_begun(self) -> bool:
        """Whether training has begun since this object was created."""
        return self._began_at is not None

    @property
    def last_record(self) -> dict[str, Any]:
        """The last record; without records a record of step 0."""
        return self.records[-1] if self.records else {"step": 0, "iteration": 0}

    @property
    def training_seconds(self) -> float:
        """The time that training took, or has taken so far, in seconds."""
        return self.stages[0][1] if self.stages else self.seconds

    def latest_value(self, key: str) -> Any:
        """Return the last value reported under a key; None if there is no such value yet."""
        return next((r[key] for r in reversed(self.records) if r.get(key) is not None), None)

    def note_report_time(self) -> None:
        """Store the time at which records were read, and of the first training report."""
        self.reported_at = self.seconds
        if self.first_report is not None or self.plan is None:
            return
        last = self.last_record
        if "loss" in last and last["step"] > self.plan.first_step:
            self.first_report = (last["iteration"], self.seconds)

    def seconds_left(self) -> float | None:
        """Estimate the seconds to the end of training from the speed since the first report.

        None until a second report came. The time before the first report is not used, because it
        includes the compilation of kernels and the evaluation before training.
        """
        iteration: int = self.last_record.get("iteration", 0)
        if self.plan is None or self.first_report is None or iteration <= self.first_report[0]:
            return None
        # By the clock and not the reported speed, because evaluations take time too.
        pace = (self.reported_at - self.first_report[1]) / (iteration - self.first_report[0])
        seconds = pace * (self.plan.iterations - iteration)
        return max(0.0, seconds - (self.seconds - self.reported_at))

    def describe_position(self) -> str:
        """Describe the position: `step 20 of 120`, with the iteration if a step has several."""
        step, iteration = self.last_record["step"], self.last_record.get("iteration", 0)
        if self.plan is None:
            return f"step {step:,}"
        text = f"step {step:,} of {self.plan.steps:,}"
        if self.plan.iterations != self.plan.steps:
            text += f" (iteration {iteration:,} of {self.plan.iterations:,})"
        return text

    def describe_time(self) -> str:
        """Describe the elapsed time of training, and the estimate of the time left."""
        text = f"{format_clock(self.training_seconds)} elapsed"
        seconds_left = None if self.stages or self.outcome else self.seconds_left()
        return text if seconds_left is None else f"{text}, about {format_clock(seconds_left)} left"

    def describe_speed(self) -> str:
        """Describe learning rate, gradient norm and speed of the last report."""
        parts = []
        if (rate := self.latest_value("learning_rate")) is not None:
            parts.append(f"learning rate {rate:.3g}")
        if (norm := self.latest_value("grad_norm")) is not None:
            parts.append(f"gradient norm {norm:.3g}")
        if (speed := self.latest_value("tokens_per_second")) is not None:
            parts.append(f"{format_speed(speed)} trained-on tokens/s")
        return ", ".join(parts)

    def describe_memory(self) -> str:
        """Describe the peak memory and its limit; empty before the first report."""
        peak = self.latest_value("peak_memory_gb")
        if peak is None:
            return ""
        limit = "" if self.plan is None else f" of {self.plan.memory_limit_gb:.3g}"
        return f"peak memory {peak:.3g}{limit} GB"

    def describe_tiers(self) -> str:
        """Describe each tier's frequency and updates; with a single tier only skipped updates."""
        updates = self.latest_value("updates")
        if self.plan is None or updates is None:
            return ""
        skipped = sum(self.latest_value("skipped") or [])
        if list(self.plan.frequencies) == [1]:
            return f"skipped updates: {skipped:,}" if skipped else ""
        clocks = [
            f"tier {tier} (every {'step' if every == 1 else every}) {count:,}"
            for tier, (every, count) in enumerate(zip(self.plan.frequencies, updates, strict=False))
        ]
        return f"updates: {' · '.join(clocks)}" + (f" · skipped {skipped:,}" if skipped else "")

    def describe_questions(self) -> list[str]:
        """Return the last answers to `training.evaluate_tasks` as a line; empty without answers."""
        record = next((r for r in reversed(self.records) if r.get("tasks")), None)
        if record is None:
            return []
        return [f"answers: {escape(describe_tasks(record))} (step {record['step']:,})"]

    def describe_samples(self) -> list[str]:
        """Return the last answers to the prompts of `samples`, a line each."""
        answered = next((r for r in reversed(self.records) if r.get("samples")), None)
        if answered is None:
            return []
        return [
            f"{escape(sample['prompt'])} -> {escape(sample['answer'])} (step {answered['step']:,})"
            for sample in answered["samples"]
        ]

    def describe_length(self, result: Mapping[str, Any]) -> str:
        """Say how many steps result.json has, and what ended training before the last one."""
        step: int = result["step"]
        why = {"patience": "early stopping", "time": "cut"}.get(result["ended"])
        if self.plan is None or why is None:
            return f"trained {format_count(step, 'step')}"
        return f"trained {step:,} of {format_count(self.plan.steps, 'step')} ({why})"

    def describe_offered_adapter(self, adapter_step: int) -> str:
        """Say which step's adapter is offered, and by which criterion it was selected.

        It may be the last step, the one with the lowest validation loss, or the one with the most
        right answers. Without a plan of the run no criterion is known.
        """
        text = f"selected: the adapter of step {adapter_step:,}"
        evaluated = {
            r["step"]: r["val_loss"] for r in self.records if "val_loss" in r and r["step"] > 0
        }
        chosen = next((r for r in self.records if r["step"] == adapter_step and r.get("tasks")), {})
        if self.plan is None:
            return text
        candidates = self._find_candidates()
        if not self.plan.offers_best or adapter_step not in candidates & evaluated.keys():
            return f"{text}, the last one"
        of_all = f"of {len(candidates)}"
        if len(candidates) < len(evaluated):
            noun = format_count(len(candidates), "step")
            of_all = f"of {noun} at which all tiers had been updated"
        if self.plan.select_by in chosen.get("tasks", {}):
            return f"{text}, the most right answers {of_all} ({describe_tasks(chosen)})"
        loss = format_loss(evaluated[adapter_step])
        return (
            f"{text}, the lowest validation loss {of_all} "
            f"({loss}; {self.plan.describe_validation()})"
        )

    def _find_candidates(self) -> set[int]:
        """Return the evaluated steps that the run could offer; empty if they cannot be read."""
        try:
            return {losses.step for losses in read_step_losses(self.run.validation_losses)}
        except (DamagedError, OSError):  # the gate reports it; this only displays
            return set()

    def read(self) -> bool:
        """Read what is new on disk; return whether training has begun."""
        if (inode := self._inode_of_plan()) != self._plan_inode:
            self.plan, self._plan_inode = read_plan(self.run.plan), inode
            self._began_at = self._began_at or time.monotonic()
        if self._began_at is not None:
            self.seconds = time.monotonic() - self._began_at
        if self.read_metrics():
            self.note_report_time()
        return self.has_begun

    def read_metrics(self) -> bool:
        """Read the complete lines that were appended; return whether there were any.

        Truncating metrics.jsonl creates a new file, which is read from its start even if it has
        grown beyond the length of the old file.
        """
        try:
            with open_regular(self.run.metrics) as (file, _):
                inode, content = os.fstat(file.fileno()).st_ino, file.read()
        except (DamagedError, OSError):  # the training process reports it; this only displays
            return False
        if inode != self._inode or len(content) < self._offset:
            self._inode = inode
            self._offset = 0
            self.records = []
        lines = content[self._offset : content.rfind(b"\n") + 1]
        self._offset += len(lines)
        count = len(self.records)
        for line in lines.splitlines():
            with suppress(ValueError):  # a damaged line, which training reports and drops
                if record := parse_record(line):
                    self.records.append(record)
        return len(self.records) > count

    def _inode_of_plan(self) -> int | None:
        """Return the inode of plan.json, which changes when it is rewritten.

        None without the file.
        """
        try:
            return self.run.plan.stat().st_ino
        except OSError:
            return None
