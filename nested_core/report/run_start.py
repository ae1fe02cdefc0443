"""When a run began, and how many steps it set out to take."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime

from nested_core.config.schema import FineTuneConfig
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reports.training_plan import read_plan

_RUN_NAME_PATTERN = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{8}")


def count_steps(run: RunDirectory, config: FineTuneConfig | None) -> int | None:
    """The optimizer steps that a run is to take, from its plan, or before it from `iters`.

    None where epochs decide and nothing was counted yet.
    """
    plan = read_plan(run.plan)
    if plan is not None:
        return plan.steps
    if config is None or config.training.epochs is not None:
        return None
    per_step = config.grad_accumulation_steps
    is_rounded_down = config.training.reference is not None
    return config.iters // per_step if is_rounded_down else -(-config.iters // per_step)


def read_start_time(run: RunDirectory) -> datetime:
    """When a run began: its name says so, else the oldest of its files."""
    named = _RUN_NAME_PATTERN.fullmatch(run.path.resolve().name)
    if named is not None:
        with suppress(ValueError):  # digits that are no moment
            return datetime.strptime(named[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    times = []
    for path in run.path.iterdir():
        with suppress(FileNotFoundError):  # a temporary file of a run that is going on
            times.append(path.lstat().st_mtime)
    return datetime.fromtimestamp(min(times, default=0.0), UTC)
