"""Random sequences of what people and automation do, each step against a model of the registry."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nested_core.errors import ConfigError
from nested_core.registry import (
    audit,
    collect_garbage,
    history,
    list_versions,
    promote,
    read_champion,
    register,
    rollback,
)
from nested_core.registry.promotion_policy import (
    promote_by_recorded_policy,
)
from tests.core.registry.conftest import write_run
from tests.core.registry.states import NAME, missed

pytestmark = pytest.mark.usefixtures("no_time_to_decide")
SEEDS = st.integers(0, 4)
MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Change:
    """One change of the champion, at a tick of the model's clock."""

    version: str
    previous: str | None
    at: int


@dataclass
class Model:
    """What must be so: the versions with the tick and the champion of their registration."""

    registered: dict[str, tuple[int, str | None]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    barred: set[str] = field(default_factory=set)
    lines_at_registration: dict[str, int] = field(default_factory=dict)
    champion: str | None = None
    clock: int = 0

    def move(self, version: str) -> None:
        self.clock += 1
        self.changes.append(Change(version, self.champion, self.clock))
        self.champion = version
        self.stack.append(version)

    def target(self) -> str | None:
        return self.stack[-2] if len(self.stack) > 1 else None

    def by_hand(self, version: str) -> str:
        if version == self.champion:
            return "already_champion"
        self.barred.discard(version)
        self.move(version)
        return "promoted"

    def back_to(self, version: str) -> str:
        if version == self.champion:
            return "already_champion"
        if self.champion is not None:
            self.barred.add(self.champion)
        self.move(version)
        return "rolled_back"

    def back(self) -> tuple[str, str]:
        target = self.stack[-2]
        outcome = self.back_to(target)
        del self.stack[-2:]  # the step, and the version that it left
        return outcome, target

    def automatically(self, version: str, expected: str | None) -> str:
        if version == self.champion:
            return "already_champion"
        if version in self.barred:
            return "barred"
        if expected != self.champion:
            return "superseded"
        self.move(version)
        return "promoted"

    def late(self, version: str) -> str:
        at, champion = self.registered[version]
        if version != self.champion and self.changes and self.changes[-1].at > at:
            return "superseded"
        return self.automatically(version, champion)

    def last_use(self, version: str) -> tuple[int, bool]:
        used = [c for c in self.changes if version in (c.version, c.previous)]
        ticks = [(c.at, c.version == version) for c in used]
        return max([(self.registered[version][0], True), *ticks])

    def garbage(self, keep: int) -> set[str]:
        newest = sorted(self.registered, key=self.last_use, reverse=True)[:keep]
        needed = {self.champion, self.target()} | {change.previous for change in self.changes[-1:]}
        return self.registered.keys() - set(newest) - needed

    def remove(self, version: str) -> None:
        del self.registered[version]
        del self.lines_at_registration[version]
        left = [champion for champion in self.stack if champion != version]
        self.stack = [champion for champion, _ in groupby(left)]


class Sequences(RuleBasedStateMachine):
    """People register, promote, roll back and collect; events come late, twice and by reconcile."""

    def __init__(self) -> None:
        super().__init__()
        shared = MEMORY if os.access(MEMORY, os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(dir=shared))
        self.registry = self.folder / "registry"
        self.model = Model()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def pick(self, seed: int) -> str:
        return sorted(self.model.registered)[seed % len(self.model.registered)]

    def is_there(self) -> bool:
        return bool(self.model.registered)

    @rule(seed=SEEDS)
    def a_run_is_registered(self, seed: int) -> None:
        run = self.folder / f"run-{seed}"
        if not run.exists():
            write_run(run, seed)
        champion, section = self.model.champion, {"path": "x", "name": "y", "promote": "always"}
        provenance = {"champion_at_gate": champion, "config": {"registry": section}}
        lines = len(history(self.registry, NAME)) if self.registry.exists() else 0
        version = register(run, self.registry, NAME, provenance)
        # Registered again after a change, it was judged again: that counts as new.
        if self.model.lines_at_registration.get(version) != lines:
            self.model.clock += 1
            self.model.registered[version] = self.model.clock, champion
            self.model.lines_at_registration[version] = lines

    @precondition(is_there)
    @rule(seed=SEEDS)
    def a_person_promotes(self, seed: int) -> None:
        version = self.pick(seed)
        done = promote(self.registry, NAME, version, by="ann")
        assert done.outcome == self.model.by_hand(version)

    @precondition(is_there)
    @rule(seed=SEEDS, expected=SEEDS)
    def the_flow_promotes(self, seed: int, expected: int) -> None:
        version, champion = self.pick(seed), self.pick(expected)
        done = promote(
            self.registry, NAME, version, by="flow", expected_champion=champion, automatic=True
        )
        assert done.outcome == self.model.automatically(version, champion)

    @precondition(is_there)
    @rule(seed=SEEDS)
    def an_event_comes_late_or_again(self, seed: int) -> None:
        version = self.pick(seed)
        done = promote_by_recorded_policy(self.registry, NAME, version)
        assert done.outcome == self.model.late(version)

    @precondition(is_there)
    @rule()
    def reconcile_runs(self) -> None:
        was_champion = {change.version for change in self.model.changes}
        fresh = [v for v in self.model.registered if v not in was_champion]
        fresh.sort(key=lambda version: self.model.registered[version][0], reverse=True)
        expected = {version: self.model.late(version) for version in fresh}
        assert missed(self.registry) == expected
        assert "promoted" not in missed(self.registry).values()

    @precondition(is_there)
    @rule(seed=SEEDS)
    def a_person_rolls_back_to(self, seed: int) -> None:
        version = self.pick(seed)
        done = rollback(self.registry, NAME, to=version, by="bob")
        assert done.outcome == self.model.back_to(version)

    @precondition(is_there)
    @rule()
    def a_person_rolls_back(self) -> None:
        target = self.model.target()
        try:
            done = rollback(self.registry, NAME, by="bob")
        except ConfigError:
            assert target is None
        else:
            assert target is not None
            assert (done.outcome, done.version) == self.model.back()

    @precondition(is_there)
    @rule(keep=st.integers(0, 4))
    def gc_runs(self, keep: int) -> None:
        garbage = self.model.garbage(keep)
        assert set(collect_garbage(self.registry, NAME, by="ann", keep=keep).collected) == garbage
        for version in garbage:
            self.model.remove(version)

    @precondition(is_there)
    @invariant()
    def registry_and_model_agree(self) -> None:
        assert read_champion(self.registry, NAME) == self.model.champion
        assert list_versions(self.registry, NAME) == sorted(self.model.registered)
        assert audit(self.registry, NAME).is_sound
        lines = [x for x in history(self.registry, NAME) if x["action"] != "collected"]
        told = [(line["version"], line["previous"]) for line in lines]
        assert told == [(change.version, change.previous) for change in self.model.changes]


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=10,
    stateful_step_count=30,
    phases=(
        Phase.reuse,
        Phase.generate,
    ),  # to shrink an example takes minutes; 30 steps can be read
)
