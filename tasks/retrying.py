"""When a task is tried again: on an I/O error that may pass, and on nothing else."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import httpx
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import RetryConditionCallable, Task

TaskParameters = ParamSpec("TaskParameters")
TaskResult = TypeVar("TaskResult")

RUN_RETRY_DELAYS = (2, 10)  # seconds before each new try of a step on a run directory
REGISTRY_RETRY_DELAYS = (2, 5, 15)  # and of one on the registry, which others write too
PERMANENT_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT})


def is_transient(error: BaseException) -> bool:
    """Whether an error may be gone at the next try: I/O, and not about space or rights.

    Of httpx, by which Prefect's client asks its server, what failed on the way there.
    """
    if isinstance(error, httpx.TransportError):
        return True
    return isinstance(error, OSError) and error.errno not in PERMANENT_ERRNOS


def retry_on_transient_error(task: Task[..., object], run: TaskRun, state: State[Any]) -> bool:
    """Prefect's retry condition: read the exception from the state and ask `is_transient`."""
    return is_transient(exception_of(state))


def retry_on_transient_or_memory_error(
    task: Task[..., object], run: TaskRun, state: State[Any]
) -> bool:
    """As above, and on an allocation error that Python sees: training goes on where it was."""
    error = exception_of(state)
    return is_transient(error) or isinstance(error, MemoryError)


def retried_task(
    name: str,
    run_name: str,
    delays: Sequence[float],
    condition: RetryConditionCallable = retry_on_transient_error,
) -> Callable[[Callable[TaskParameters, TaskResult]], Task[TaskParameters, TaskResult]]:
    """Make a function a task that is tried again after each of the delays, and never cached."""
    return task(
        name=name,
        task_run_name=run_name,
        retries=len(delays),
        retry_delay_seconds=list(delays),
        retry_condition_fn=condition,
        cache_policy=NO_CACHE,
    )


def exception_of(state: State[Any]) -> BaseException:
    """The exception that a failed state holds."""
    try:
        state.result(raise_on_failure=True)
    except BaseException as error:  # the state may hold any exception; it is only looked at
        return error
    return RuntimeError("the state holds no exception")
