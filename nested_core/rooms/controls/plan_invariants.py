"""The control of the plan: what every sound run does, held against what this one did.

The learning rate that was asked for is reached, it does not rise again where a run is resumed, and
each row is trained on at least once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.config.schema import FineTuneConfig
from nested_core.optim.learning_rate_schedules import build_learning_rate, count_warmup_steps
from nested_core.records.metrics import read_metrics
from nested_core.records.plan import TrainingPlan, read_plan
from nested_core.records.verdict import CheckRow
from nested_core.rooms.controls.answer_rows import RunRows
from nested_core.rooms.controls.results import ControlWarning, NotApplicableError, Told

NAME = "plan and run"
Records = Sequence[Mapping[str, Any]]
RISE = 1.05  # of the rate, beyond rounding
SPENT_RATE = 0.01  # of the highest: nothing more is learnt
MAX_SPENT = 0.25  # of the steps; a cosine's last are 7 %


def measure_plan(run: RunRows) -> Told:
    """Compare the run's plan with its metrics and the number of training rows."""
    judged, last = run.judged, run.judged.verdict.last_step
    plan, records = read_plan(judged.run.plan), read_metrics(judged.run.metrics)
    if plan is None or last is None:
        raise NotApplicableError("the run keeps no plan")
    warnings = [*find_broken_invariants(judged.config, plan, records, len(run.train), last)]
    kinds = ", ".join(one.kind.replace("_", " ") for one in warnings) or "passed"
    yield CheckRow(NAME, after=f"{plan.passes_until(last):.3g} passes", verdict=kinds)
    yield from warnings


def find_broken_invariants(
    config: FineTuneConfig, plan: TrainingPlan, records: Records, rows: int, last: int
) -> Iterator[ControlWarning]:
    """Yield a warning for each rule that a run broke.

    records: of metrics.jsonl. rows: the number of training rows. last: the last step.
    """
    named: dict[str, Any] = {"last": last, "all": plan.steps}
    rates = [(one["step"], one["learning_rate"]) for one in records if one.get("learning_rate")]
    schedule = config.lr_schedule
    warmup = count_warmup_steps(config, plan.steps) or (schedule.warmup if schedule else 0)
    highest = max((rate for _, rate in rates), default=0.0)
    if rates and warmup > last:
        yield ControlWarning.told("rate_never_reached", highest, warmup=warmup, **named)
    spent, top = (last, 0.0) if schedule is None else _find_spent_rate(config, plan, last)
    if schedule is not None and last - spent > MAX_SPENT * last:
        has_steps = schedule.name in ("cosine_decay", "linear_schedule")
        slower = f"the run's {plan.steps:,} steps" if has_steps else "a slower decay"
        named |= {"first": spent + 1, "top": top, "slower": slower}
        yield ControlWarning.told("rate_spent", float(last - spent) / last, **named)
    for (before, lower), (after, higher) in pairwise(rates):
        is_resumed = any(before <= step < after for step in plan.resumed_at)
        if is_resumed and before >= warmup and higher > RISE * lower:
            named |= {"lower": lower, "before": before, "higher": higher, "after": after}
            yield ControlWarning.told("rate_rose_on_resume", higher / lower, **named)
    passes = plan.passes_until(last)
    if round(passes * rows) < rows:
        yield ControlWarning.told("rows_never_used", 1 - passes, rows=rows, **named)


def _find_spent_rate(config: FineTuneConfig, plan: TrainingPlan, last: int) -> tuple[int, float]:
    """Return the last step whose rate, of the schedule's, is not spent; and the highest rate."""
    rate = build_learning_rate(config, plan.steps)
    rates = np.array(rate(mx.arange(last)) if callable(rate) else (), np.float64)
    highest = float(rates.max(initial=0.0))
    return int(1 + np.flatnonzero(rates >= SPENT_RATE * highest).max(initial=-1)), highest
