"""The retry table: what is tried again, what is not, and how often by which task."""

from __future__ import annotations

import errno
from typing import Any

import httpx
import pytest
from prefect.states import Completed, Failed

from nested_core.errors import (
    ConfigError,
    DamagedError,
    DatasetError,
    GateRejected,
    TrainingDiverged,
    TrainingStopped,
    UpdateNotApplied,
)
from tasks.finetune import gate, load, register, train, validate
from tasks.promote import promote
from tasks.retrying import (
    is_transient,
    retry_on_transient_error,
    retry_on_transient_or_memory_error,
)

LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT)
PASSING = (
    errno.EIO,
    errno.EAGAIN,
    errno.EINTR,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ESTALE,
    errno.EBUSY,
    errno.EMFILE,
    errno.ENETUNREACH,
)
OTHERS = (
    GateRejected("rejected"),
    ConfigError("wrong"),
    DatasetError("bad line"),
    DamagedError("damaged"),
    TrainingStopped("stopped"),
    TrainingDiverged("diverged"),
    UpdateNotApplied("lost"),
    ValueError("wrong"),
    KeyError("name"),
)


def asked(condition: Any, error: BaseException) -> bool:
    """What a retry condition answers to a state that failed with an error."""
    return bool(condition(None, None, Failed(message="failed", data=error)))


AWAY = (httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("cut"))
CASES = [
    *((OSError(number, "as raised by the system"), False) for number in LASTING),
    *((OSError(number, "as raised by the system"), True) for number in PASSING),
    *((error, False) for error in (*OTHERS, httpx.InvalidURL("no such thing"))),
    *((error, True) for error in AWAY),
]


@pytest.mark.parametrize(("error", "is_passing"), CASES, ids=repr)
def test_what_may_pass_is_tried_again_and_nothing_else(error, is_passing) -> None:
    assert is_transient(error) is is_passing
    assert asked(retry_on_transient_error, error) is is_passing
    assert asked(retry_on_transient_or_memory_error, error) is is_passing


def test_an_allocation_error_is_tried_again_by_training_alone() -> None:
    assert asked(retry_on_transient_or_memory_error, MemoryError())
    assert not asked(retry_on_transient_error, MemoryError())


def test_a_state_without_an_error_is_not_tried_again() -> None:
    for condition in (retry_on_transient_error, retry_on_transient_or_memory_error):
        assert not condition(None, None, Completed(data=None))  # type: ignore[arg-type]


TABLE: list[tuple[Any, int, Any]] = [
    (validate, 2, retry_on_transient_error),
    (load, 2, retry_on_transient_error),
    (train, 2, retry_on_transient_or_memory_error),
    (gate, 0, None),
    (register, 3, retry_on_transient_error),
    (promote, 3, retry_on_transient_error),
]


@pytest.mark.parametrize(("task", "retries", "condition"), TABLE, ids=[t.name for t, _, _ in TABLE])
def test_each_task_has_the_retries_and_the_condition_of_the_table(task, retries, condition) -> None:
    assert task.retries == retries
    assert task.retry_condition_fn is condition
