"""The flow that tries a grid of settings, a deployment run each, and promotes the best verified."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

from prefect import flow, get_run_logger, runtime
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.states import Completed, Failed, State
from pydantic import Field, JsonValue

from flows.flow_runs.allowed_folders import with_allowed_paths, with_trusted_code
from flows.flow_runs.nights import SWEEP_TAG
from flows.flow_runs.prefect_logs import prepare_logs, tolerate_closed_output
from flows.rooms.sweep.results import pick_best_run
from nested_core import seams
from nested_core.config.loading import parse_config
from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.config.section_base import Section
from nested_core.config.sections import RegistrySection
from nested_core.errors import ConfigError, NestedTuneError
from nested_core.models.session import Session
from nested_core.pipeline.continual import champion_or_none
from nested_core.records.outcome_names import Outcome
from nested_core.registry import Decision
from nested_core.registry.policy import APPROVE_KEY
from nested_core.registry.promotion_policy import effective_rule
from nested_core.rooms.sweep.choice import SweepChoice
from nested_core.rooms.sweep.page import SweepRunResult, find_registered_version
from nested_core.rooms.sweep.points import (
    Point,
    grid_points,
    refuse_incomparable_keys,
    settings_of_point,
)
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest
from tasks.finetune import register
from tasks.prefect_server import asking_server

SECONDS_BETWEEN_LOOKS = 10.0
MOST_RUNS = 256
MAX_RUNS_READ = 100  # in one look: those that were started first
SECONDS_UNTIL_RESUMED = 180.0  # after a crash: 20 s of the automation, and what the server may lag


class SweepParameters(Section):
    """What stays the same, what is varied, and the deployment that trains."""

    base: FineTuneConfig = Field(description="the settings that all runs share")
    grid: Annotated[dict[str, list[JsonValue]], Field(min_length=1)] = Field(
        description="key -> the values to try; a key in a section is written nested.fast"
    )
    deployment: str = Field(
        pattern="^finetune/[^/]+$", description="the deployment that trains: finetune/NAME"
    )

    def configurations(self) -> list[FineTuneConfig]:
        """The configuration of each point; ConfigError for one that cannot run."""
        return [
            parse_config(settings_of_point(self.base, point), source=f"sweep: the point {point}")
            for point in grid_points(self.grid)
        ]


@flow(name="sweep", retries=0, flow_run_name="sweep {config.base.model}")
def sweep(config: SweepParameters) -> State[Any]:
    """Run every point of the grid, show the results in a table, and promote the best.

    The runs register what the gate verified and promote nothing; the best by validation loss is
    promoted by the base's own policy, against the champion that its gate compared it with. Where
    the gate judged on validation examples, `better` counts among how many they chose.
    """
    tolerate_closed_output()
    prepare_logs()
    target = with_trusted_code(with_allowed_paths(config.base)).registry
    if target.path is None or target.name is None:
        raise ConfigError("sweep: base.registry.path and name are needed to compare what came out.")
    champion = champion_or_none(Path(target.path), target.name)
    refuse_incomparable_keys(config.grid, config.base)
    points = grid_points(config.grid)
    if len(points) > MOST_RUNS:
        raise ConfigError(f"sweep: the grid has {len(points)} points, at most {MOST_RUNS}.")
    # A point that cannot run is found before any is started.
    policy: Point = {"registry.promote": "never", "continual.skip_unchanged": False}
    settings = [settings_of_point(config.base, point | policy) for point in points]
    run_ids = [
        _start_run(config.deployment, index, point, values)
        for index, (point, values) in enumerate(zip(points, settings, strict=True))
    ]
    ended = _wait_for_runs(run_ids)
    outcomes = [
        SweepRunResult.read_from_run(
            _run_directory_of(index),
            point,
            run.state.name or "",
            str(run.state.message),
            is_candidate=run.state.is_completed() and run.state.name != Outcome.KEPT_CHAMPION,
        )
        for index, (point, run) in enumerate(zip(points, ended, strict=True))
        if run.state is not None
    ]
    best = pick_best_run(outcomes)
    if best is None and any(o.state == Outcome.KEPT_CHAMPION for o in outcomes):
        message = f"none of {len(points)} runs is better than the champion that they started from"
        return Completed(name=Outcome.KEPT_CHAMPION, message=message)
    if best is None:
        return Failed(message=f"none of {len(points)} runs passed the gate")
    decision = promote_choice(target, best, outcomes, champion)
    if decision.outcome == "waiting":
        request_approval = seams.load_only("request_approval", APPROVE_KEY)
        request_approval(Path(target.path), target.name, decision.version)
    verified = sum(outcome.has_passed for outcome in outcomes)
    what = (
        f"{verified} of {len(points)} verified; best {shorten_digest(decision.version)}: "
        f"{best.describe()}"
    )
    outcome = Outcome.PROMOTED if decision.outcome == "promoted" else Outcome.VERIFIED
    return Completed(name=outcome, message=f"{what}; {decision.sentence}")


def promote_choice(
    target: RegistrySection,
    best: SweepRunResult,
    outcomes: Sequence[SweepRunResult],
    champion: str | None,
) -> Decision:
    """What came of the promotion of the best run's version, by the policy of the sweep.

    The runs of the points promote nothing, and a choice that may be luck stays under their policy:
    its own verdict does not know of the other points, and `reconcile` would go by that.
    """
    version = find_registered_version(target, best)
    run = RunDirectory(Path(best.run_dir))
    if effective_rule(target).must_be_better:
        runs = [RunDirectory(Path(outcome.run_dir)) for outcome in outcomes]
        luck = SweepChoice.read(run, runs).why_not_better()
        if luck is not None:
            return Decision("refused", version, champion, luck)
    config = read_run_config(run).model_copy(update={"registry": target})
    return register(config, run.path, Session())


def _run_directory_of(index: int) -> RunDirectory:
    """Known before the run starts, so that its result is found; the same for a retried sweep."""
    key = str(runtime.flow_run.id).replace("-", "")[-8:]
    return RunDirectory(Path("runs") / f"sweep-{key}" / f"{index:03d}")


def _start_run(
    deployment: str, index: int, point: dict[str, JsonValue], values: dict[str, Any]
) -> Any:
    """Start the run of a point; a sweep that is run again finds the one it started before."""
    started = run_deployment(
        deployment,
        parameters={"config": values | {"run_dir": str(_run_directory_of(index).path)}},
        timeout=0,
        idempotency_key=f"{runtime.flow_run.id}-{index}",
        flow_run_name=f"{index:03d} " + ", ".join(f"{k}={v}" for k, v in point.items()),
        tags=[SWEEP_TAG],
        as_subflow=True,  # Prefect cancels the runs of a sweep that is cancelled
    )
    return started.id  # type: ignore[union-attr]  # the sync call returns no coroutine


def _wait_for_runs(run_ids: list[UUID]) -> list[FlowRun]:
    """The runs, once all have ended: looked at in one request, and again after an outage."""
    ended: dict[UUID, FlowRun] = {}
    crashed_at: dict[UUID, float] = {}
    while waiting := [run_id for run_id in run_ids if run_id not in ended]:
        with asking_server("the sweep's runs are looked at later") as client:
            asked = waiting[:MAX_RUNS_READ]
            wanted = FlowRunFilter.model_validate({"id": {"any_": asked}})
            found = client.read_flow_runs(flow_run_filter=wanted)
            if len(found) < len(asked):
                raise NestedTuneError(f"sweep: {len(asked) - len(found)} of its runs were deleted.")
            for run in found:
                if run.state is not None and run.state.is_crashed():
                    crashed_at.setdefault(run.id, time.monotonic())
                seconds = time.monotonic() - crashed_at.get(run.id, time.monotonic())
                if run.state is not None and has_ended(run, seconds):
                    get_run_logger().info("%s: %s %s", run.name, run.state.name, run.state.message)
                    ended[run.id] = run
        if len(ended) < len(run_ids):
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return [ended[run_id] for run_id in run_ids]


def has_ended(run: FlowRun, seconds_crashed: float) -> bool:
    """Whether a run will not go on; one that crashed in its first go does, within a while.

    `seconds_crashed` is how long ago it was first seen Crashed, by this machine's clock.
    """
    if run.state is None or not run.state.is_final():
        return False
    is_resumed = run.state.is_crashed() and run.run_count == 1
    return not is_resumed or seconds_crashed > SECONDS_UNTIL_RESUMED
