"""A failure at every system call of a change of the registry, in turn: it was made, or it was not.

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
from typing import Any

import pytest

from nested_core.config.sections import RegistrySection
from nested_core.records.judged_run import read_judged_run
from nested_core.registry import (
    Decision,
    check_champion,
    list_versions,
    promotion_outcome,
    read_champion,
    rollback,
)
from nested_core.registry.data_store import RunExamples, read_stored_data
from nested_core.registry.folders import name_exists
from nested_core.registry.ledger import read_ledger
from nested_core.registry.policy import read_policy, set_policy
from nested_core.registry.promotion_policy import register_by_policy
from nested_core.registry.registration import NewVersion
from nested_core.seams import is_there, load
from tests.builders.registering import promote, register, register_and_promote
from tests.core.registry.conftest import write_run
from tests.core.registry.states import NAME, assert_settled
from tests.core.registry.system_calls import EVERY_CALL, FAILURES, SAMPLE, can_trace, each_call
from tests.registry_care import audit, collect_garbage, forget, forget_rows

# The children of these forks only touch files; that the parent has threads does not matter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.slow("fails at each system call in turn"),
]


@pytest.fixture(autouse=True)
def _can_be_traced() -> None:
    if not can_trace():
        pytest.skip("this machine lets no process be traced (ptrace)")


@pytest.fixture(autouse=True)
def _gc_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotion_outcome, "UNPROMOTED_GRACE_TIME", timedelta(0))


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
    return make_three(memory)


def examples_of(seed: int) -> RunExamples:
    """Examples of which each version has some of its own and some that others have."""
    train, held_out = (
        [{"prompt": f"{split} {number}?", "completion": "yes"} for number in (0, seed)]
        for split in ("train", "held out")
    )
    return RunExamples(train, held_out)


def make_three(memory: Path) -> tuple[str, str, str]:
    first, second, third = (
        register(
            write_run(memory / f"run-{seed}", seed),
            memory / "registry",
            NAME,
            {},
            examples=examples_of(seed),
        )
        for seed in range(3)
    )
    promote(memory / "registry", NAME, first, by="ann")
    promote(memory / "registry", NAME, second, by="ann")
    return first, second, third


Change = Callable[[Path, Path, tuple[str, str, str]], object]
# What is done to a registry, with the folder of the runs, and its three versions.
CHANGES: dict[str, Callable[..., object]] = {
    "promote": lambda place, runs, three: promote(place, NAME, three[2], by="ann"),
    "rollback": lambda place, runs, three: rollback(place, NAME, by="ann"),
    "policy": lambda place, runs, three: set_policy(
        place, NAME, by="ann", changes={"promote": "better"}
    ),
    "forget": lambda place, runs, three: forget(place, NAME, three[2], by="ann", reason="lost"),
    "gc": lambda place, runs, three: collect_garbage(place, NAME, by="ann", keep=0),
    "forget_rows": lambda place, runs, three: forget_rows(
        place, NAME, lambda row: row["prompt"] in ("train 0?", "train 2?"), by="ann"
    ),
    "register": lambda place, runs, three: register(
        runs / "run-9", place, NAME, {}, examples=examples_of(9)
    ),
    "register_and_promote": lambda place, runs, three: register_and_promote(
        runs / "run-9", place, NAME, {}, by="ann", examples=examples_of(9)
    ),
}


def register_by_policy_of(place: Path, runs: Path) -> Decision:
    """Register a run whose policy promotes it against the champion of now, as a fine-tune does."""
    run = read_judged_run(runs / "run-9")
    section = RegistrySection(path=str(place), name=NAME, promote="always")
    champion = read_champion(place, NAME) if name_exists(place, NAME) else None
    return register_by_policy(NewVersion(run, {}, examples_of(9)), section, champion)


CHANGES["register_by_policy"] = lambda place, runs, three: register_by_policy_of(place, runs)
if is_there("approval"):
    decline = load("nested_core.rooms.approval.answers:decline")
    CHANGES["decline"] = lambda place, runs, three: decline(place, NAME, three[2], by="ann")


def state_of(place: Path) -> tuple[Any, ...]:
    """What a registry says: champion, versions and their examples, policy, lines of the history."""
    if not name_exists(place, NAME):
        return (None, [], None, [])
    told = [(e.action, e.version, e.previous) for e in read_ledger(place / NAME).entries]
    versions = [(one, read_stored_data(place, NAME, one)) for one in list_versions(place, NAME)]
    return read_champion(place, NAME), versions, read_policy(place, NAME), told


@pytest.mark.claim(
    "A registry has one champion; an edit of its history is found, unless all is rewritten"
)
@pytest.mark.parametrize("stride", [SAMPLE, EVERY_CALL])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_after_a_failure_at_any_call_the_next_command_finds_history_link_and_views_agreeing(
    memory, change, is_new, failure, stride, capsys
) -> None:
    """A change was made or was not, whole; a version alone may be there where it was to follow."""
    registry = memory / "registry"
    three = ("", "", "")
    if not is_new:
        three = make_three(memory)
    elif change not in ("register", "register_and_promote", "register_by_policy", "policy"):
        pytest.skip("a name that is not there has nothing to change")
    else:
        registry.mkdir()
    write_run(memory / "run-9", 9)
    if change == "forget":
        (registry / NAME / "versions" / three[2] / "gate.json").unlink()
    old = state_of(registry)
    whole = shutil.copytree(registry, memory / "whole", symlinks=True)
    act = partial(CHANGES[change], runs=memory, three=three)
    act(whole)
    new = state_of(whole)
    points = {"old": 0, "between": 0, "new": 0}
    for copy, has_returned in each_call(registry, failure, stride, act):
        if name_exists(copy, NAME) and (copy / NAME / "versions").is_dir():
            assert read_champion(copy, NAME) in (old[0], new[0])
            assert change == "forget" or audit(copy, NAME).findings == ()
            assert check_champion(copy, NAME) in (old[0], new[0])  # a writer, which finishes
        now = state_of(copy)
        if now[3]:
            assert change == "forget" or audit(copy, NAME).findings == ()
            assert_settled(copy, is_sound=now == new or change != "forget")
        if now == new:
            points["new"] += 1
        else:
            points["old" if now == old else "between"] += 1
            assert not has_returned
            assert now[3] == new[3][: len(now[3])], "the lines are those of the change, or fewer"
            act(copy)
            assert state_of(copy)[:3] == new[:3]
            assert_settled(copy)
    with capsys.disabled():
        print(f"\n{change}, {failure}: {points}", end="")
    if stride == 1 and failure != "torn":
        assert min(points["old"], points["new"]) > 0


def test_a_swap_that_is_not_atomic_would_be_found(memory, versions) -> None:
    def swap_in_two_steps(place: Path) -> None:
        (place / NAME / "champion").unlink()
        (place / NAME / "champion").symlink_to(f"versions/{versions[2]}")

    champions = [
        read_champion(copy, NAME)
        for copy, _ in each_call(memory / "registry", "kill", 1, swap_in_two_steps)
    ]
    assert None in champions
