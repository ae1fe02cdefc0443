"""How a run follows the champion: rebuilt from the base, or going on; `auto` decides by the clock.

`auto` rebuilds while a run on all that the lineage was trained on is forecast to fit into
`continual.window`. Then it goes on from the champion, until the rows that came since the last
rebuilt version are GATHERED_SHARE of those that fit: then it rebuilds on as many as fit.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DatasetError
from nested_core.models.session import Session
from nested_core.pipeline import steps
from nested_core.records.start import Choice
from nested_core.storage.run_directory import open_run
from nested_core.text.duration_format import format_duration

GATHERED_SHARE = 0.5
POLICY_KEY = "continual.policy: auto"


@dataclass(frozen=True)
class Gathered:
    """How many rows a run could be trained on.

    new: its own; earlier: those of the lineage that may be trained on beside them.
    since_rebuild: of both together, those that no rebuilt version of the lineage has seen; None
        for a lineage without a rebuilt version.
    """

    new: int
    earlier: int
    since_rebuild: int | None


@dataclass(frozen=True)
class Decision:
    """What a run does; most: how many earlier rows it is rebuilt on, None for all."""

    choice: Choice
    most: int | None = None


def decide(config: FineTuneConfig, champion: str | None, gathered: Gathered) -> Decision:
    """What `rebuild` or `auto` says.

    `auto` trains a few steps to measure, unless there is nothing but the run's own data. Raises
    ConfigError for `auto` where the room minutes is not installed.
    """
    if config.continual.policy == "rebuild":
        return Decision(Choice("rebuild", "continual.policy is rebuild"))
    if champion is None or not gathered.earlier:
        return Decision(Choice("rebuild", "there are no earlier rows beside tonight's"))
    try:
        measured = measure_rebuilding(config)
    except DatasetError:  # the run's own check finds the same, and writes the report on it
        return Decision(Choice("rebuild", "the data has errors"))
    return decide_by_forecast(config, gathered, measured)


def decide_by_forecast(config: FineTuneConfig, gathered: Gathered, measured: Any) -> Decision:
    """What `auto` does, by what a run on all rows is forecast to take.

    measured: the MeasuredRun of the room minutes for such a run.
    """
    window, limit = config.continual.window_seconds, config.continual.window
    rows = gathered.new + gathered.earlier
    fixed = measured.seconds - measured.training_seconds
    seconds_a_row = measured.training_seconds / rows
    going_on = fixed + seconds_a_row * gathered.new / (1 - config.replay_fraction)
    seconds = {"rebuild": measured.seconds, "continue": going_on}
    if measured.seconds <= window:
        reason = f"all {rows:,} rows fit into the window of {limit}"
        return Decision(Choice("rebuild", reason, seconds))
    fitting = max(0, int((window - fixed) / seconds_a_row))
    most = fitting - gathered.new
    since = rows if gathered.since_rebuild is None else gathered.since_rebuild
    needed = GATHERED_SHARE * fitting
    if most > 0 and since >= needed:
        took = fixed + seconds_a_row * fitting
        reason = (
            f"all {rows:,} rows do not fit into the window of {limit}, and {since:,} came since "
            f"the last rebuilt version: on a sample of {most:,} earlier rows, about "
            f"{format_duration(took)}"
        )
        return Decision(Choice("rebuild", reason, seconds), most)
    if most <= 0:
        reason = f"tonight's {gathered.new:,} rows fill the window of {limit} alone"
    else:
        reason = (
            f"all {rows:,} rows do not fit into the window of {limit}, and {since:,} rows since "
            f"the last rebuilt version are fewer than {int(needed):,}, half of those that fit"
        )
    return Decision(Choice("continue", reason, seconds))


def measure_rebuilding(config: FineTuneConfig) -> Any:
    """How long a run rebuilt on all rows takes, as `explain` forecasts it; nothing is kept."""
    measure = seams.load_only("run_measurement", POLICY_KEY)
    rebuilding = config.continual.model_copy(update={"policy": "rebuild"})
    config = config.model_copy(update={"continual": rebuilding})
    with tempfile.TemporaryDirectory(prefix="nested-tune-") as folder, Session() as session:
        run = open_run(Path(folder) / "run", resume=False)
        with run.locked():
            steps.write_run_config(config, run, resume=False)
            steps.validate(config, run)
            steps.write_initial_adapter_and_tiers(config, run, session=session)
            return measure(config, run, session, None)[1]
