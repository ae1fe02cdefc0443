"""Writers of one registry at once, killed at random times, and a lock that somebody deletes."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from nested_core.errors import ConfigError, DamagedError
from nested_core.registry import (
    check_champion,
    history,
    list_versions,
    promotion_outcome,
    read_champion,
    rollback,
)
from tests.builders.registering import promote, register, register_and_promote
from tests.core.registry.conftest import write_run
from tests.core.registry.states import NAME, assert_settled
from tests.registry_care import audit, collect_garbage

# The children of these forks only touch files; that the parent has threads does not matter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.timeout(1800),
]
MEMORY = Path("/dev/shm")
LOST_LOCK = 7
WORKERS, RUNS = 3, 5


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(promotion_outcome, "UNPROMOTED_GRACE_TIME", timedelta(0))
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


class FindingsError(Exception):
    """An audit found something."""


def audit_strictly(registry: Path) -> None:
    if findings := audit(registry, NAME).findings:
        raise FindingsError(str(findings))


def work(registry: Path, runs: list[Path], seed: int) -> None:
    """Change the registry at random, without end."""
    dice = random.Random(seed)
    actions: list[Callable[[], object]] = [
        lambda: register(dice.choice(runs), registry, NAME, {}),
        lambda: register_and_promote(dice.choice(runs), registry, NAME, {}, by="ann"),
        lambda: promote(registry, NAME, dice.choice(list_versions(registry, NAME)), by="bob"),
        lambda: rollback(registry, NAME, by="bob"),
        lambda: collect_garbage(registry, NAME, by="gc", keep=dice.randrange(3)),
        lambda: audit_strictly(registry),
    ]
    while True:
        with suppress(ConfigError):  # collected meanwhile, or nothing to go back to
            dice.choice(actions)()


def may_come_of_a_lost_lock(error: BaseException) -> bool:
    named = "was (removed|made) or replaced|something writes to it without the lock"
    is_named = re.search(named, str(error)) is not None
    return isinstance(error, FindingsError) or (isinstance(error, DamagedError) and is_named)


def start(action: Callable[[], None], deletes_lock: bool) -> int:
    """A forked process; exit code LOST_LOCK if its lock was removed, 1 for anything unexpected.

    A lock that was removed before an audit began does not keep its writer out: what the audit then
    finds may be that writer at work. Whether it is damage, the audit after the round says.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
        except BaseException as error:
            if deletes_lock and may_come_of_a_lost_lock(error):
                code = LOST_LOCK
            else:
                traceback.print_exc(file=sys.__stderr__)
        finally:
            print(end="", file=sys.__stderr__, flush=True)
            os._exit(code)
    return child


@pytest.mark.slow("starts and kills some hundred writers")
@pytest.mark.parametrize("deletes_lock", [False, True])
@pytest.mark.parametrize("rounds", [6, pytest.param(500, marks=pytest.mark.reliability)])
def test_writers_killed_at_random_leave_a_sound_registry(
    memory: Path, deletes_lock: bool, rounds: int, capsys: pytest.CaptureFixture[str]
) -> None:
    registry, dice = memory / "registry", random.Random(rounds)
    runs = [write_run(memory / f"run-{seed}", seed) for seed in range(RUNS)]
    for run in runs[:2]:
        register_and_promote(run, registry, NAME, {}, by="ann")
    ended: Counter[int] = Counter()
    for number in range(rounds):
        seeds = range(number * WORKERS, (number + 1) * WORKERS)
        children = [
            start(lambda seed=seed: work(registry, runs, seed), deletes_lock)  # type: ignore[misc]
            for seed in seeds
        ]
        if deletes_lock:
            for _ in range(3):
                time.sleep(dice.uniform(0.0, 0.03))
                (registry / NAME / ".lock").unlink(missing_ok=True)
        for child in children:
            time.sleep(dice.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            ended[os.waitstatus_to_exitcode(status)] += 1
        assert audit(registry, NAME).findings == ()
        champion = check_champion(registry, NAME)  # a writer, which finishes what was cut short
        assert champion == read_champion(registry, NAME)
        assert champion in list_versions(registry, NAME)
        other = runs[number % RUNS]
        done = register_and_promote(other, registry, NAME, {}, by="ann")
        assert done.previous == champion
        assert_settled(registry)
    lines = len(history(registry, NAME))
    with capsys.disabled():
        print(f"\n{rounds} rounds, {lines} lines, exits {dict(ended)}", end="")
    assert set(ended) <= {-signal.SIGKILL, LOST_LOCK}
