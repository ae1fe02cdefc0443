"""The control of the plan: what every sound run does, held against what this one did.

The learning rate that was asked for is reached, it does not rise again where a run is resumed, and
each row is trained on at least once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.gate.checks.judged import CheckedRun
from nested_core.optim.learning_rate_schedules import count_warmup_steps
from nested_core.records.metrics import read_metrics
from nested_core.records.plan import TrainingPlan, read_plan
from nested_core.records.verdict import CheckRow
from nested_core.rooms.controls.results import Control, ControlWarning, NotApplicableError, Result

NAME = "plan and run"
Records = Sequence[Mapping[str, Any]]
RISE = 1.05  # of the rate, beyond rounding
SPENT_RATE = 0.01  # of the highest: nothing more is learnt
MAX_SPENT = 0.25  # of the steps; a cosine's last are 7 %


def measure_plan(judged: CheckedRun, train: TokenizedSplit) -> Result:
    """Compare the run's plan with its metrics and the number of training rows."""
    plan, last = read_plan(judged.run.plan), judged.verdict.last_step
    if plan is None or last is None:
        raise NotApplicableError("the run keeps no plan")
    records = read_metrics(judged.run.metrics)
    warnings = list(find_broken_invariants(judged.config, plan, records, len(train), last))
    passes = f"{plan.passes_until(last):.3g} passes"
    result = ", ".join(one.kind.replace("_", " ") for one in warnings) or "passed"
    return Result([CheckRow(NAME, after=passes, verdict=result)], warnings)


def find_broken_invariants(
    config: FineTuneConfig, plan: TrainingPlan, records: Records, rows: int, last: int
) -> Iterator[ControlWarning]:
    """Yield a warning for each rule that a run broke.

    records: of metrics.jsonl. rows: the number of training rows. last: the last step.
    """
    reported = [(one["step"], one["learning_rate"]) for one in records if "learning_rate" in one]
    rates = [(step, rate) for step, rate in reported if rate]
    schedule = config.lr_schedule
    warmup = count_warmup_steps(config, plan.steps) or (schedule.warmup if schedule else 0)
    highest = max((rate for _, rate in rates), default=0.0)
    if rates and warmup > last:
        yield ControlWarning(
            "rate_never_reached",
            highest,
            f"the learning rate that was asked for is never reached: the warm-up takes "
            f"{warmup:,} steps and the run had {last:,}, so that the highest rate was "
            f"{highest:.3g}. Give training.warmup_steps a small share, such as 0.05",
        )
    spent = _find_spent_step(reported, SPENT_RATE * highest)
    if rates and spent is not None and last - spent > MAX_SPENT * last:
        yield ControlWarning(
            "rate_spent",
            (last - spent) / last,
            f"nothing was learnt any more from step {spent:,} of {last:,} on: the learning rate "
            f"was below a hundredth of its highest, {highest:.3g}. Its schedule ends long "
            f"before the run: give lr_schedule the run's {plan.steps:,} steps",
        )
    for (before, lower), (after, higher) in pairwise(rates):
        is_resumed = any(before <= step < after for step in plan.resumed_at)
        if is_resumed and before >= warmup and higher > RISE * lower:
            yield ControlWarning(
                "rate_rose_on_resume",
                higher / lower,
                f"the learning rate rose again where the run was resumed, from {lower:.3g} at "
                f"step {before:,} to {higher:.3g} at step {after:,}: its schedule was planned "
                f"for another number of steps. For the schedule that was asked for, train all "
                f"{plan.steps:,} steps in a new run",
            )
    passes = plan.passes_until(last)
    unused = rows - round(passes * rows)
    if unused > 0:
        yield ControlWarning(
            "rows_never_used",
            unused / rows,
            f"{unused:,} of {rows:,} training rows were never trained on: the run ended after "
            f"{passes:.2g} passes. Raise iters, or give training.epochs",
        )


def _find_spent_step(rates: Sequence[tuple[int, float]], least: float) -> int | None:
    """Return the first step from which no reported rate is `least` or more; None without one."""
    used = max((step for step, rate in rates if rate >= least), default=0)
    return next((step for step, _ in rates if step > used), None)


PLAN = Control("plan", NAME, measure_plan)
