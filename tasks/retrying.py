"""When a task is tried again: on an I/O error that may pass, and on nothing else."""

from __future__ import annotations

import errno
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

LASTING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT})


def is_passing(error: BaseException) -> bool:
    """Whether an error may be gone at the next try: I/O, and not about space or rights."""
    return isinstance(error, OSError) and error.errno not in LASTING


def retry_on_passing_error(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Prefect's retry condition: read the exception from the state and ask `is_passing`."""
    return is_passing(_exception_of(state))


def retry_training(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """As above, and on an allocation error that Python sees: training goes on where it was."""
    error = _exception_of(state)
    return is_passing(error) or isinstance(error, MemoryError)


def _exception_of(state: State[Any]) -> BaseException:
    try:
        state.result(raise_on_failure=True)
    except BaseException as error:  # the state may hold any exception; it is only looked at
        return error
    return RuntimeError("the state holds no exception")
