"""Find another night of an adapter at work, in whose favour a second one does not train.

The run that comes to it looks, and ends as "Skipped: another night". Prefect's own answer, a
deployment's concurrency limit with CANCEL_NEW, does not see a second night behind a pool that runs
one at a time: no worker asks for it before the first has ended. And such a limit is a lease that
the training has to renew: a server that is away for longer than a lease lasts (300 seconds) ends a
live training without a checkpoint. A run looks at others here, and changes none of them.
"""

from __future__ import annotations

from prefect import runtime
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext

from nested_core.storage.run_directory import find_run_of
from tasks.prefect_server import asking_server, flow_runs_in

MAX_NIGHTS_READ = 20
AT_WORK = (StateType.RUNNING, StateType.PAUSED)


def find_other_night() -> str | None:
    """Return a sentence if this night is to be skipped for another one that is active; else None.

    The other night is a run of the same deployment. Only a run that a schedule started is skipped,
    and no retry of one.
    """
    context = FlowRunContext.get()
    own = None if context is None else context.flow_run
    if own is None or own.deployment_id is None or not own.auto_scheduled:
        return None
    if (runtime.flow_run.run_count or 1) > 1:
        return None
    running = flow_runs_in(AT_WORK, deployment_id={"any_": [own.deployment_id]})
    nights: list[FlowRun] = []
    with asking_server("other runs of this adapter are not checked") as client:
        nights = client.read_flow_runs(
            flow_run_filter=running, sort=FlowRunSort.START_TIME_ASC, limit=MAX_NIGHTS_READ
        )
    own = next((night for night in nights if night.id == own.id), own)  # with its start time
    return describe_other_night(own, nights)


def describe_other_night(own: FlowRun, nights: list[FlowRun]) -> str | None:
    """Return a sentence about the first of `nights` for which `own` is skipped; None if it trains.

    Of two active nights the one that began first trains, or, if they began at the same time, the
    one with the lower id. A night that has not begun is no reason: it will find this one active. A
    suspended night counts as active, since Resume goes on with it.
    """
    for other in nights:
        if other.id == own.id or other.start_time is None or own.start_time is None:
            continue
        if (other.start_time, other.id) > (own.start_time, own.id):
            continue
        flow_run = f"flow run {other.name!r} ({other.id})"
        if other.state_type == StateType.RUNNING:
            return f"another run of this adapter is active, {flow_run}"
        if other.state_type == StateType.PAUSED and find_run_of(other.id) is not None:
            return f"another run of this adapter is suspended, {flow_run}: resume or cancel it"
    return None
