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


@pytest.mark.parametrize("number", LASTING, ids=errno.errorcode.get)
def test_an_error_about_space_rights_or_existence_is_not_tried_again(number: int) -> None:
    error = OSError(number, "as raised by the system")
    assert not is_transient(error)
    assert not asked(retry_on_transient_error, error)
    assert not asked(retry_on_transient_or_memory_error, error)


@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
def test_another_io_error_is_tried_again(number: int) -> None:
    error = OSError(number, "as raised by the system")
    assert is_transient(error)
    assert asked(retry_on_transient_error, error)
    assert asked(retry_on_transient_or_memory_error, error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_what_is_no_io_error_is_never_tried_again(error: BaseException) -> None:
    assert not is_transient(error)
    assert not asked(retry_on_transient_error, error)
    assert not asked(retry_on_transient_or_memory_error, error)


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
def test_each_task_has_the_retries_and_the_condition_of_the_table(
    task: Any, retries: int, condition: Any
) -> None:
    assert task.retries == retries
    assert task.retry_condition_fn is condition


@pytest.mark.parametrize(
    "error",
    [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("cut")],
)
def test_a_server_that_is_away_for_a_while_is_a_reason_to_try_again(error: Exception) -> None:
    assert is_transient(error)
    assert not is_transient(httpx.InvalidURL("no such thing"))
