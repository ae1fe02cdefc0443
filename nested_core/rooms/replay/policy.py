"""How a run follows the champion: rebuilt from the base, or going on; `auto` decides by the clock.

`auto` rebuilds while a run on all that the lineage was trained on is forecast to fit into
`continual.window`, and goes on from the champion when it does not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DatasetError
from nested_core.models.session import Session
from nested_core.pipeline import steps
from nested_core.records.start import Choice
from nested_core.storage.run_directory import open_run

POLICY_KEY = "continual.policy: auto"


def decide(config: FineTuneConfig, champion: str | None, new: int, earlier: int) -> Choice:
    """Return whether a run under the policy `rebuild` or `auto` starts from base or champion.

    For `auto` a few steps are trained to forecast how long rebuilding takes, unless there is no
    earlier data; without it, a run is the same as a rebuilt one.

    Args:
        config: the run's configuration.
        champion: the version that the run follows; None before the first.
        new: the number of the run's own rows.
        earlier: the number of earlier rows, of the lineage, that it could be trained on too.

    Raises:
        ConfigError: for `auto` where the room minutes is not installed.
    """
    if config.continual.policy == "rebuild":
        return Choice("rebuild", "continual.policy is rebuild")
    if champion is None or not earlier:
        return Choice("rebuild", "there are no earlier rows beside tonight's")
    try:
        measured = measure_rebuilding(config)
    except DatasetError:  # validating the run will find the same errors, and report them
        return Choice("rebuild", "the data has errors")
    return decide_by_forecast(config, new, earlier, measured)


def decide_by_forecast(config: FineTuneConfig, new: int, earlier: int, measured: Any) -> Choice:
    """Return the choice of `auto`: rebuild if a run on all rows fits into the window of time.

    new, earlier: numbers of rows, as in `decide`.
    measured: the forecast of a run on all rows, a MeasuredRun of the room minutes.
    """
    window, limit = config.continual.window_seconds, config.continual.window
    rows = new + earlier
    not_training = measured.seconds - measured.training_seconds
    training = measured.training_seconds / rows * new / (1 - config.replay_fraction)
    if config.training.epochs is None:  # `iters` steps, however few rows are new
        training = measured.seconds_a_step * config.iters / config.grad_accumulation_steps
    seconds = {"rebuild": measured.seconds, "continue": not_training + training}
    if measured.seconds <= window:
        return Choice("rebuild", f"all {rows:,} rows fit into the window of {limit}", seconds)
    return Choice("continue", f"all {rows:,} rows do not fit into the window of {limit}", seconds)


def measure_rebuilding(config: FineTuneConfig) -> Any:
    """Return the forecast (a MeasuredRun, as for `explain`) of a run rebuilt on all rows.

    The run directory is temporary. Raises ConfigError without the room minutes, DatasetError.
    """
    seams.require("minutes", POLICY_KEY)
    from nested_core.rooms.minutes.forecast import measure_run

    rebuilding = config.continual.model_copy(update={"policy": "rebuild"})
    config = config.model_copy(update={"continual": rebuilding})
    with tempfile.TemporaryDirectory(prefix="nested-tune-") as folder, Session() as session:
        run = open_run(Path(folder) / "run", resume=False)
        with run.locked():
            steps.write_run_config(config, run, resume=False)
            steps.validate(config, run)
            steps.write_initial_adapter_and_tiers(config, run, session=session)
            return measure_run(config, run, session, None)[1]
