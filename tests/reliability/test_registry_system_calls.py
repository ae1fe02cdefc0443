"""A failure at every system call of a change of the registry, in turn: the old state or the new.

A kill, a torn write, and the errors that a file system answers with: EIO, ENOSPC, EINTR, EMFILE.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from nested_core.registry import (
    audit,
    check_champion,
    collect_garbage,
    garbage_collection,
    history,
    list_versions,
    promote,
    read_champion,
    register,
    register_and_promote,
    rollback,
)
from nested_core.registry.registration import read_judged_run
from tests.core.registry.conftest import write_run
from tests.core.registry.states import NAME, assert_old_or_new_and_whole, assert_settled
from tests.core.registry.system_calls import (
    EVERY_CALL,
    FAILURES,
    SAMPLE,
    Failure,
    can_trace,
    interrupted_at,
)
from tests.left_out import slow_except

# The children of these forks only touch files; that the parent has threads does not matter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _can_be_traced() -> None:
    if not can_trace():
        pytest.skip("this machine lets no process be traced (ptrace)")


@pytest.fixture(autouse=True)
def _gc_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage_collection, "UNPROMOTED_GRACE_TIME", timedelta(0))


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: a killed process loses nothing that it has written."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def versions(memory: Path) -> tuple[str, str, str]:
    """Versions A, B and C in `memory`/registry; A and then B have been promoted."""
    first, second, third = (
        register(write_run(memory / f"run-{seed}", seed), memory / "registry", NAME, {})
        for seed in range(3)
    )
    promote(memory / "registry", NAME, first, by="ann")
    promote(memory / "registry", NAME, second, by="ann")
    return first, second, third


def each_call(
    memory: Path, failure: Failure, stride: int, action: Callable[[Path], object]
) -> Iterator[tuple[Path, bool]]:
    """Registries in which `action` met the failure at a call, and whether it said it was done."""
    for number in range(1, 100_000, stride):
        copy = shutil.copytree(memory / "registry", memory / "copy", symlinks=True)
        met = interrupted_at(number, failure, partial(action, copy))
        if met.call is None:
            assert met.has_returned
        else:
            yield copy, met.has_returned
        shutil.rmtree(copy)
        if met.call is None:
            return


@pytest.mark.parametrize("stride", [SAMPLE, EVERY_CALL])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(
    "change",
    slow_except(
        ["promote", "rollback", "register_and_promote"],
        "promote",
        reason="interrupts a process at many calls",
    ),
)
def test_failure_at_a_call_leaves_the_old_or_the_new_champion_and_the_next_change_settles(
    memory: Path,
    versions: tuple[str, str, str],
    change: str,
    failure: Failure,
    stride: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, old, third = versions
    run = write_run(memory / "run-9", 9)
    fourth = read_judged_run(run).verdict.trained.digest
    actions: dict[str, tuple[str, Callable[[Path], object]]] = {
        "promote": (third, lambda place: promote(place, NAME, third, by="ann")),
        "rollback": (first, lambda place: rollback(place, NAME, by="ann")),
        "register_and_promote": (
            fourth,
            lambda place: register_and_promote(run, place, NAME, {}, by="ann"),
        ),
    }
    new, action = actions[change]
    points = {old: 0, new: 0}
    for copy, has_returned in each_call(memory, failure, stride, action):
        assert_old_or_new_and_whole(copy, old, new)
        assert read_champion(copy, NAME) == new or not has_returned
        before = check_champion(copy, NAME)  # a writer, which finishes
        assert before is not None
        assert_settled(copy)
        points[before] += 1
        other = third if new == first else first
        settled = promote(copy, NAME, other, by="bob", expected_champion=before)
        assert (settled.outcome, settled.previous) == ("promoted", before)
        assert_settled(copy)
        assert rollback(copy, NAME, by="bob").version == before
        assert_settled(copy)
    with capsys.disabled():
        print(f"\n{change}, {failure}: {points[old]} points left the old champion, ", end="")
        print(f"{points[new]} the new one", end="")
    if stride == 1 and failure != "torn":
        assert min(points.values()) > 0
        assert sum(points.values()) > 150


@pytest.mark.slow("interrupts a process at many calls")
@pytest.mark.parametrize("stride", [SAMPLE, EVERY_CALL])
@pytest.mark.parametrize("failure", FAILURES)
def test_failure_at_a_call_of_register_leaves_no_version_or_a_whole_one(
    memory: Path,
    versions: tuple[str, str, str],
    failure: Failure,
    stride: int,
) -> None:
    run = write_run(memory / "run-9", 9)
    version = register(run, memory / "elsewhere", NAME, {})
    for copy, has_returned in each_call(
        memory, failure, stride, lambda place: register(run, place, NAME, {})
    ):
        made = (copy / NAME / "versions" / version).exists()
        assert made or not has_returned
        assert_old_or_new_and_whole(copy, versions[1], versions[1])
        assert register(run, copy, NAME, {}) == version
        assert promote(copy, NAME, version, by="bob").outcome == "promoted"
        assert_settled(copy)


@pytest.mark.slow("interrupts a process at many calls")
@pytest.mark.parametrize("stride", [SAMPLE, EVERY_CALL])
@pytest.mark.parametrize("failure", FAILURES)
def test_failure_at_a_call_of_gc_leaves_a_version_whole_or_collects_it(
    memory: Path, versions: tuple[str, str, str], failure: Failure, stride: int
) -> None:
    first, second, third = versions
    for copy, has_returned in each_call(
        memory, failure, stride, lambda place: collect_garbage(place, NAME, by="ann", keep=0)
    ):
        assert read_champion(copy, NAME) == second
        assert audit(copy, NAME).findings == ()
        is_there = third in list_versions(copy, NAME)
        assert not (is_there and has_returned)
        was_said = history(copy, NAME)[-1]["action"] == "collected"
        assert is_there or was_said
        assert collect_garbage(copy, NAME, by="bob", keep=0).collected == (third,) * is_there
        assert list_versions(copy, NAME) == sorted((first, second))
        assert_settled(copy)


def test_a_swap_that_is_not_atomic_would_be_found(
    memory: Path, versions: tuple[str, str, str]
) -> None:
    def swap_in_two_steps(place: Path) -> None:
        (place / NAME / "champion").unlink()
        (place / NAME / "champion").symlink_to(f"versions/{versions[2]}")

    champions = [
        read_champion(copy, NAME) for copy, _ in each_call(memory, "kill", 1, swap_in_two_steps)
    ]
    assert None in champions
