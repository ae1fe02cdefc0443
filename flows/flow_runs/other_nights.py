"""A second night of one adapter does not train: the run that comes to it looks, and ends Skipped.

Prefect's own answer, a deployment's concurrency limit with CANCEL_NEW, does not see a second night
behind a pool that runs one at a time: no worker asks for it before the first has ended. And such a
limit is a lease that the training has to renew: a server that is away for longer than a lease lasts
(300 seconds) ends a live training without a checkpoint. A run looks at others here, and changes
none of them.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from prefect import runtime
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext

from tasks.prefect_server import asking_server, flow_runs_in

MAX_NIGHTS_READ = 20
WAITING_TYPES = frozenset({StateType.SCHEDULED, StateType.PENDING})
ACTIVE_TYPES = (*WAITING_TYPES, StateType.RUNNING)
SERVER_CLOCK_MARGIN = timedelta(minutes=1)  # the server's and this machine's


def find_other_night() -> str | None:
    """Why this night need not train, in a sentence; None where it is to train.

    Another night of its deployment is at work, or a later one is due already and will train on
    newer data. A run that is tried again, or was not started by a schedule, is to train.
    """
    context = FlowRunContext.get()
    own = None if context is None else context.flow_run
    if own is None or own.deployment_id is None or not own.auto_scheduled:
        return None
    if (runtime.flow_run.run_count or 1) > 1:
        return None
    active = flow_runs_in(ACTIVE_TYPES, deployment_id={"any_": [own.deployment_id]})
    nights: list[FlowRun] = []
    with asking_server("other nights of this adapter are not looked at") as client:
        nights = client.read_flow_runs(
            flow_run_filter=active,
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
            limit=MAX_NIGHTS_READ,
        )
    return describe_other_night(own, nights, datetime.now(UTC))


def describe_other_night(own: FlowRun, nights: list[FlowRun], now: datetime) -> str | None:
    """The sentence about the first of `nights` in whose favour `own` is skipped, if there is one.

    Of two nights that are at work the one due first trains; of two due at once the lower id.
    """
    for other in nights:
        if other.id == own.id or other.expected_start_time is None:
            continue
        is_later = (other.expected_start_time, other.id) > (own.expected_start_time, own.id)
        if other.state_type == StateType.RUNNING and not is_later:
            return f"another night of this adapter is at work, flow run {other.name!r} ({other.id})"
        is_due = other.expected_start_time <= now + SERVER_CLOCK_MARGIN
        if other.state_type in WAITING_TYPES and is_later and is_due and other.auto_scheduled:
            return (
                f"a later night of this adapter is due already, flow run {other.name!r} "
                f"({other.id}), and trains on what the data is then"
            )
    return None
