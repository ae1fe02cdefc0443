"""Random sequences of a registry's commands and flow steps, with kills and edits from outside.

    python -m tests.reliability.registry_sequences --sequences 200 --seed 1

Each step is made on a registry and on a model of it that knows nothing of files, and the two are
compared: champion, versions, policy, outcome, and where a rollback would go. Some steps run in a
process that is killed at a random call to the operating system. Some edits are made from outside:
then the audit has to name the damage, and what it advises is followed to a sound registry.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import re
import shlex
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

from flows import cli
from nested_core.config.sections import RegistrySection
from nested_core.errors import ConfigError, DamagedError, GateRejected
from nested_core.records.judged_run import read_rejected_run
from nested_core.registry import (
    Decision,
    check_champion,
    history,
    list_versions,
    promotion_outcome,
    read_champion,
)
from nested_core.registry.judgements import read_verdicts
from nested_core.registry.ledger import REGISTRATION_ACTIONS, read_ledger
from nested_core.registry.policy import read_policy, set_policy
from nested_core.registry.promotion_policy import (
    promote_by_recorded_policy,
    promote_missed_versions,
)
from nested_core.registry.registration import NewVersion, register_rejection
from nested_core.rooms.approval.answers import approve, decline
from nested_core.storage.adapter import read_adapter
from tests.builders.registering import promote, register, register_and_promote
from tests.core.registry.conftest import write_run
from tests.core.registry.faults import killed_at
from tests.core.registry.states import NAME, promote_by_policy, restore_from
from tests.gate_files import judged_files, read_gate, write_gate
from tests.registry_care import audit

RUNS = 5
STEPS = 25
KILLED_SHARE = 0.2
DAMAGED_SHARE = 0.2
MOST_CALLS = 60  # of the changing ones that a step makes: a kill comes at one of them
MODES = ("never", "approve", "better", "always")
BOUND = 0.02
MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Verdict:
    """A verdict on a version as the model knows it."""

    mode: str
    rival: str | None
    difference: float
    is_loose: bool
    has_passed: bool
    lines: int

    @property
    def words(self) -> tuple[object, ...]:
        """What gate.json says, without what is recorded beside it."""
        return (self.rival, self.difference, self.is_loose, self.has_passed)


@dataclass
class Model:
    """What has to be so, whatever the files are."""

    champion: str | None = None
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    standing: set[str] = field(default_factory=set)  # was champion since it was registered
    barred: dict[str, int] = field(default_factory=dict)  # by which change
    chosen: dict[str, int] = field(default_factory=dict)  # promoted, or freed, by which change
    returning: str | None = None  # to what a rollback goes back that was not barred
    stack: list[str] = field(default_factory=list)
    change_lines: list[int] = field(default_factory=list)
    policy: dict[str, Any] = field(default_factory=dict)
    moves: int = 0
    data: dict[str, str] = field(default_factory=dict)  # by version, the hash of its data set
    said: list[tuple[str, str]] = field(default_factory=list)  # "champion" or "no", of a version

    def change(self, version: str | None, line: int) -> None:
        self.champion = version
        if version is not None and version != self.returning:
            self.chosen[version] = len(self.change_lines)
        self.returning = None
        self.change_lines.append(line)
        if version is not None:
            self.standing.add(version)
            self.said.append(("champion", version))

    def decline(self, version: str) -> None:
        own = [word for word, other in self.said if other == version]
        if own[-1:] != ["no"]:
            self.said.append(("no", version))

    def has_a_no(self, version: str) -> bool:
        """Whether a person said no to it or to one of the same data, and neither rose since."""
        alike = {each for each, data in self.data.items() if data == self.data[version]}
        return any(
            word == "no"
            and other in alike
            and not {("champion", version), ("champion", other)} & {*self.said[number:]}
            for number, (word, other) in enumerate(self.said)
        )

    def push(self, version: str, line: int) -> None:
        if not self.stack or self.stack[-1] != version:
            self.stack.append(version)
        self.change(version, line)

    def target(self) -> str | None:
        if self.stack and self.stack[-1] != self.champion:
            return self.stack[-1]
        return self.stack[-2] if len(self.stack) > 1 else None

    def leave_for(self, target: str) -> None:
        """Bar what a rollback leaves, unless it goes back to one barred since that was chosen."""
        undone = self.barred.pop(target, -1)
        self.returning = target if undone < 0 else None
        if self.champion is not None and self.chosen.get(self.champion, -1) >= undone:
            self.barred[self.champion] = len(self.change_lines)

    def back(self, line: int) -> str | None:
        target = self.target()
        if target is None:
            return None
        self.leave_for(target)
        if self.stack[-1] != target:
            self.stack.pop()
        self.change(target, line)
        return target

    def remove(self, version: str) -> None:
        self.verdicts.pop(version, None)
        self.standing.discard(version)
        left = [each for each in self.stack if each != version]
        self.stack = [each for each, _ in itertools.groupby(left)]

    def newest(self, version: str) -> Verdict:
        against = [each for each in self.verdicts[version] if each.rival == self.champion]
        return (against or self.verdicts[version])[-1]

    def refusal(self, version: str, mode: str, champion: str | None) -> str | None:
        """Why a version is not promoted by itself, in a word."""
        verdict = self.newest(version)
        modes = {mode, self.policy.get("promote")}
        if "never" in modes:
            return "never"
        if not verdict.has_passed:
            return "rejected it"
        if self.policy.get("max_val_loss_increase") is not None and verdict.is_loose:
            return "looser thresholds"
        if "better" in modes and champion is not None:
            if verdict.rival != champion:
                return "did not evaluate the champion"
            if verdict.difference > 0:
                return "is not better"
        if "approve" not in modes:
            return None
        return "declined already" if self.has_a_no(version) else "waiting for approval"

    def outcome(self, version: str, mode: str, expected: str | None) -> str:
        if version == self.champion:
            return "already_champion"
        refusal = self.refusal(version, mode, expected)
        if refusal is not None:
            return refusal
        if version in self.barred:
            return "barred"
        return "promoted" if expected == self.champion else "superseded"

    def late(self, version: str) -> str:
        verdict = self.newest(version)
        if version == self.champion:
            return "already_champion"
        if any(line >= verdict.lines for line in self.change_lines):
            return "superseded"
        return self.outcome(version, verdict.mode, verdict.rival)


class Sequence:
    """One registry, its model, its runs, and the dice."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.registry = folder / "registry"
        self.dice = random.Random(seed)
        self.model = Model()
        self.seen: Counter[str] = Counter()
        self.log: list[str] = []
        self.runs: dict[str, Path] = {}
        self.judged: dict[str, Verdict] = {}
        for number in range(RUNS):
            run = write_run(folder / f"run-{number}", number)
            version = read_adapter(run / "adapter").digest()
            self.runs[version] = run
            self.model.data[version] = f"{number // 2:064x}"  # two runs of the same, twice
        self.judge(self.any_run())
        self.register_first()

    # What there is

    @property
    def name_folder(self) -> Path:
        return self.registry / NAME

    def lines(self) -> int:
        return len(history(self.registry, NAME)) if self.name_folder.exists() else 0

    def any_run(self) -> str:
        return self.dice.choice(sorted(self.runs))

    def any_version(self) -> str:
        return self.dice.choice(sorted(self.model.verdicts))

    def section(self, mode: str) -> RegistrySection:
        return RegistrySection.model_validate(
            {"path": str(self.registry), "name": NAME, "promote": mode}
        )

    # Steps: each returns what it does to the registry, and what it does to the model

    def judge(self, version: str, *, passed: bool = True) -> Verdict:
        """Give a run a new verdict, against the champion of now."""
        champion = self.model.champion if self.model.champion != version else None
        verdict = Verdict(
            mode=self.dice.choice(MODES),
            rival=champion,
            difference=self.dice.choice((-1.0, -0.5, 0.5)),
            is_loose=self.dice.random() < 0.2,
            has_passed=passed,
            lines=self.lines(),
        )
        run = self.runs[version]
        gate = read_gate(run / "gate.json")
        record = None
        if champion is not None:
            ends = [verdict.difference - 0.1, verdict.difference + 0.1]
            record = {"version": champion, "loss": 3.0, "difference": verdict.difference}
            record |= {"interval": ends, "examples": 84, "smallest_visible": 0.1}
        bound = 1000.0 if verdict.is_loose else BOUND
        thresholds = {"noise": "paired", "max_val_loss_increase": bound, "tasks": []}
        reasons = [] if passed else [{"code": "task_below", "message": "x", "tensors": []}]
        changed: dict[str, Any] = {"verdict": "passed" if passed else "failed", "reasons": reasons}
        changed |= {"thresholds": thresholds, "champion": record}
        changed |= {"last_step": int(10 * verdict.difference)}  # that it can be read again by
        files = judged_files(run)
        write_gate(run, gate | changed, {n: e for n, e in files.items() if n != "gate.json"})
        self.judged[version] = verdict
        return verdict

    def provenance(self, version: str, verdict: Verdict) -> dict[str, Any]:
        own = {"path": "x", "name": NAME, "promote": verdict.mode}
        made_of = {"dataset_digest": self.model.data[version], "settings_digest": "5" * 64}
        return {"config": {"registry": own}, "champion_at_gate": verdict.rival} | made_of

    def record(self, model: Model, version: str, verdict: Verdict, *, now: bool) -> None:
        """What keeping a verdict does to the model."""
        known = model.verdicts.setdefault(version, [])
        if not known:
            known.append(verdict)
        elif now:
            newest = known[-1]
            same = (newest.words, newest.mode, newest.lines)
            if same != (verdict.words, verdict.mode, verdict.lines):
                known.append(verdict)
        elif verdict.words not in [each.words for each in known]:
            known.append(verdict)

    def register_first(self) -> None:
        version = next(iter(self.judged))
        verdict = self.judged[version]
        register(self.runs[version], self.registry, NAME, self.provenance(version, verdict))
        self.record(self.model, version, verdict, now=True)

    def step_register(self) -> None:
        version = self.any_run()
        verdict = self.judge(version)
        done = self.do(
            lambda: register(
                self.runs[version], self.registry, NAME, self.provenance(version, verdict)
            ),
            lambda model: self.record(model, version, verdict, now=True),
        )
        assert done in (version, None)

    def step_rejected(self) -> None:
        version = self.any_version()
        verdict = self.judge(version, passed=False)
        self.do(
            lambda: register_rejection(
                NewVersion(
                    read_rejected_run(self.runs[version]), self.provenance(version, verdict)
                ),
                self.registry,
                NAME,
            ),
            lambda model: self.record(model, version, verdict, now=True),
        )
        self.judge(version)

    def step_run_promoted_by_person(self) -> None:
        version = self.any_run()
        if version not in self.judged or not self.judged[version].has_passed:
            self.judge(version)
        verdict = self.judged[version]
        line = self.lines()

        def expect(model: Model) -> str:
            as_of_now = Verdict(
                verdict.mode,
                verdict.rival,
                verdict.difference,
                verdict.is_loose,
                verdict.has_passed,
                line,
            )
            self.record(model, version, as_of_now, now=False)
            return self.by_person(model, version, line)

        self.do(
            lambda: register_and_promote(
                self.runs[version], self.registry, NAME, self.provenance(version, verdict), by="ann"
            ),
            expect,
        )

    def by_person(self, model: Model, version: str, line: int) -> str:
        if not model.newest(version).has_passed:
            return "GateRejected"
        if version == model.champion:
            return "already_champion"
        model.barred.pop(version, None)
        model.push(version, line)
        return "promoted"

    def step_version_promoted_by_person(self) -> None:
        version, line = self.any_version(), self.lines()
        self.do(
            lambda: promote(self.registry, NAME, version, by="ann"),
            lambda model: self.by_person(model, version, line),
        )

    def automatic(self, model: Model, version: str, outcome: str, line: int) -> str:
        if outcome == "promoted":
            model.push(version, line)
        return outcome

    def step_fine_tune_promotes(self) -> None:
        version, mode, line = self.any_version(), self.dice.choice(MODES), self.lines()
        expected = self.dice.choice([self.model.champion, self.any_version()])
        if expected == version:
            expected = None
        self.do(
            lambda: promote_by_policy(self.section(mode), version, expected),
            lambda model: self.automatic(
                model, version, model.outcome(version, mode, expected), line
            ),
        )

    def step_event(self) -> None:
        version, line = self.any_version(), self.lines()
        self.do(
            lambda: promote_by_recorded_policy(self.registry, NAME, version),
            lambda model: self.automatic(model, version, model.late(version), line),
        )

    def step_reconcile(self) -> None:
        before = self.model.champion
        changes = {line["version"] for line in history(self.registry, NAME)}
        outcomes = promote_missed_versions(self.registry, NAME)
        champion = read_champion(self.registry, NAME)
        promoted = [v for v, decision in outcomes.items() if decision.outcome == "promoted"]
        assert len(promoted) <= 1
        assert all(self.model.late(version) == "promoted" for version in promoted)
        if not promoted:
            fresh = [v for v in self.model.verdicts if v not in changes]
            assert all(self.model.late(version) != "promoted" for version in fresh)
            assert champion == before
        for version in promoted:
            self.model.push(version, self.lines() - 1)
        assert check_champion(self.registry, NAME) == champion

    def step_approved(self) -> None:
        version, line = self.any_version(), self.lines()
        expected = self.model.champion

        def expect(model: Model) -> str:
            if version == model.champion:
                return "already_champion"
            refusal = model.refusal(version, "approve", model.champion)
            if refusal not in (None, "waiting for approval", "declined already"):
                return refusal
            return self.by_person(model, version, line)

        self.do(
            lambda: approve(self.registry, NAME, version, by="eve", expected_champion=expected),
            expect,
        )

    def step_declined(self) -> None:
        version = self.any_version()
        self.do(
            lambda: decline(self.registry, NAME, version, by="eve"),
            lambda model: model.decline(version),
        )

    def step_rollback(self) -> None:
        line = self.lines()
        self.do(
            lambda: self.command("rollback", NAME),
            lambda model: "rolled_back" if model.back(line) else "exit 2",
        )

    def step_rollback_to(self) -> None:
        version, line = self.any_version(), self.lines()

        def expect(model: Model) -> str:
            if version == model.champion:
                return "already_champion"
            model.leave_for(version)
            model.push(version, line)
            return "rolled_back"

        self.do(lambda: self.command("rollback", NAME, "--to", version), expect)

    def step_gc(self) -> None:
        keep = self.dice.randrange(4)
        before = set(self.model.verdicts)
        needed = {self.model.champion, self.model.target()} & before
        self.command("gc", NAME, "--keep", str(keep))
        left = set(list_versions(self.registry, NAME))
        assert needed <= left <= before
        assert len(left) >= min(keep, len(before))
        for version in before - left:
            self.model.remove(version)

    def step_policy(self) -> None:
        mode = self.dice.choice(MODES)
        changes = {"promote": mode, "max_val_loss_increase": self.dice.choice((None, BOUND))}

        def expect(model: Model) -> None:
            model.policy = dict(changes)

        self.do(lambda: set_policy(self.registry, NAME, by="ann", changes=changes), expect)

    def step_lock_removed(self) -> None:
        (self.name_folder / ".lock").unlink(missing_ok=True)

    # Doing a step, whole or killed

    def command(self, *words: str) -> str:
        """A command of the command line, here; its first word of output, or its exit code."""
        output = StringIO()
        with redirect_stdout(output):
            code = cli.main([words[0], *words[1:], "--registry", str(self.registry)])
        return f"exit {code}" if code else output.getvalue().split(":")[0]

    def do(self, act: Callable[[], Any], expect: Callable[[Model], Any]) -> Any:
        """Make a step, and on the model; the outcome, None where it was killed."""
        new = copy.deepcopy(self.model)
        expected = expect(new)
        if self.dice.random() < KILLED_SHARE:
            return self.do_killed(act, new)
        try:
            done = act()
        except GateRejected:
            done = "GateRejected"
        outcome = done.sentence if isinstance(done, Decision) else done
        if isinstance(expected, str):
            assert isinstance(outcome, str)
            assert expected in outcome, f"{outcome!r}, expected {expected!r}"
        self.model = new
        return done

    def do_killed(self, act: Callable[[], Any], new: Model) -> None:
        """Make a step in a process that is killed; old or new has to be so then, whole."""

        def run(_: Path) -> None:
            try:
                act()
            except (ConfigError, GateRejected):
                return

        was_killed = killed_at(self.dice.randrange(1, MOST_CALLS), run, self.registry)
        self.seen["killed" if was_killed else "ended before its kill"] += 1
        report = audit(self.registry, NAME)
        assert report.is_sound, report.findings
        assert report.champion in (self.model.champion, new.champion)
        self.command("gc", NAME, "--keep", "99")  # the next writer mends what was cut short
        now = self.read_state()
        old, whole = self.state_of(self.model), self.state_of(new)
        assert now in (old, whole) or self.is_between(now, new), (now, old, whole)
        if now == whole and now != old:
            self.model = new
        elif now != old:  # the version is registered, and what was to follow did not
            self.model.verdicts = new.verdicts
        self.settle_verdicts(new)

    def is_between(self, now: tuple[Any, ...], new: Model) -> bool:
        """Whether the first half of a step took effect: the version is there, and not champion."""
        half = copy.deepcopy(self.model)
        half.verdicts = new.verdicts
        return now == self.state_of(half)

    def settle_verdicts(self, new: Model) -> None:
        """Take over a verdict that the killed step may have kept, by counting what is there."""
        for version, known in new.verdicts.items():
            if version in self.model.verdicts:
                count = 1 + len(read_ledger(self.name_folder).judgements(version))
                longer = max(known, self.model.verdicts[version], key=len)
                assert count in (len(longer), len(longer) - 1)
                self.model.verdicts[version] = longer[:count]

    def state_of(self, model: Model) -> tuple[Any, ...]:
        policy = {k: v for k, v in model.policy.items() if v is not None}
        declined = [version for word, version in model.said if word == "no"]
        return model.champion, sorted(model.verdicts), policy, model.target(), declined

    def read_state(self) -> tuple[Any, ...]:
        policy = read_policy(self.registry, NAME)
        fields = {} if policy is None else policy.fields()
        wanted = {k: v for k, v in fields.items() if v is not None and k != "tasks"}
        target = read_ledger(self.name_folder).rollback_target()
        champion = read_champion(self.registry, NAME)
        lines = history(self.registry, NAME)
        declined = [line["version"] for line in lines if line["action"] == "declined"]
        return champion, list_versions(self.registry, NAME), wanted, target, declined

    # Damage from outside, and the way out that the audit names

    def damage(self) -> None:
        backup = self.folder / "backup"
        shutil.rmtree(backup, ignore_errors=True)
        shutil.copytree(self.name_folder, backup, symlinks=True)
        kind = self.dice.choice([name for name in dir(self) if name.startswith("damage_")])
        self.log.append(kind)
        self.seen[kind] += 1
        getattr(self, kind)()

    def loosen(self, path: Path) -> None:
        for each in (path.parent, path):
            each.chmod(each.stat().st_mode | 0o200)

    def told(self) -> str:
        """What the audit says and advises; it names damage."""
        report = audit(self.registry, NAME)
        assert not report.is_sound
        return "\n".join(f"{f.file} {f.message} {f.advice or ''}" for f in report.findings)

    def restore(self, name: str) -> None:
        """Put back a file or folder from the backup."""
        restore_from(self.folder / "backup" / name, self.name_folder / name)

    def damage_version(self) -> None:
        """A file of a version is edited, or its folder removed; one of the ways out is taken."""
        candidates = sorted(set(self.model.verdicts) & (self.model.standing | set(self.runs)))
        version = self.dice.choice(candidates)
        place = self.name_folder / "versions" / version
        is_removed = self.dice.random() < 0.5
        place.chmod(0o755)
        if is_removed:
            shutil.rmtree(place)
        else:
            path = place / self.dice.choice(sorted(os.listdir(place)))
            self.loosen(path)
            path.write_bytes(path.read_bytes()[:-2] + b"x")
        report = audit(self.registry, NAME)
        if report.is_sound:  # never champion, and gone: nothing knows of it
            assert is_removed
            assert version not in self.model.standing
            self.model.remove(version)
            return
        advice = self.told()
        way = self.dice.choice(("backup", "promote", "forget"))
        if way == "backup":
            self.restore(f"versions/{version}")
        elif way == "promote" or version not in self.model.standing:
            self.promote_again(version, place, advice)
        else:
            self.forget(version, advice)

    def promote_again(self, version: str, place: Path, advice: str) -> None:
        assert "judgements" in advice or f"promote RUN_DIR --name {NAME}" in advice
        shutil.rmtree(place, ignore_errors=True)
        if not self.judged[version].has_passed:
            self.judge(version)
        verdict = self.judged[version]
        try:
            done = register_and_promote(
                self.runs[version], self.registry, NAME, self.provenance(version, verdict), by="ann"
            )
        except GateRejected:  # judged again and rejected since: it is restored all the same
            done = None
        self.reread_verdicts(version)
        line = self.lines() - 1
        if done is not None and done.outcome == "promoted":
            self.by_person(self.model, version, line)

    def forget(self, version: str, advice: str) -> None:
        shown = version[:12]
        if version == self.model.champion:
            others = sorted(set(list_versions(self.registry, NAME)) - {version})
            if others:
                line = self.lines()
                assert self.command("rollback", NAME, "--to", others[0]) == "rolled_back"
                self.model.leave_for(others[0])
                self.model.push(others[0], line)
            else:
                (self.name_folder / "champion").unlink()
                self.model.change(None, self.lines())
        command = re.search(rf"`(nested-tune forget {NAME} {shown}[^`]*)`", advice)
        assert command is not None, advice
        words = shlex.split(command[1])[1:]
        words = [word for word in words if word not in ("--registry", str(self.registry))]
        assert self.command(*words) == "forgotten"
        if self.model.champion is None:
            self.model.moves += 1
        self.model.remove(version)

    def reread_verdicts(self, version: str) -> None:
        """After a version was registered again its first verdict is another: read them anew."""
        ledger = read_ledger(self.name_folder)
        self.model.verdicts[version] = [
            Verdict(
                mode=str((each.facts.policy or {})["promote"]),
                rival=each.verdict.rival,
                difference=(each.verdict.last_step or 0) / 10,
                is_loose=each.verdict.bound("max_val_loss_increase") != BOUND,
                has_passed=each.verdict.has_passed,
                lines=sum(
                    e.action not in REGISTRATION_ACTIONS for e in ledger.entries[: each.line_number]
                ),
            )
            for each in read_verdicts(self.name_folder, version, ledger)
        ]

    def damage_link(self) -> None:
        """The link is moved by hand: to nothing, to a version, away, or a folder stands there."""
        link = self.name_folder / "champion"
        if not link.is_symlink():
            return
        how = self.dice.choice(("nowhere", "version", "removed", "folder"))
        link.unlink()
        line = self.lines()
        if how == "nowhere":
            link.symlink_to(f"versions/{'0' * 64}")
            self.refused_by_writers()
            try:
                check_champion(self.registry, NAME)
            except DamagedError as error:
                self.follow_link_command(str(error))
            return
        version = self.any_version() if how == "version" else None
        if how == "version":
            link.symlink_to(f"versions/{version}")
        elif how == "folder":
            link.mkdir()
            assert "Remove it" in self.told()
            link.rmdir()
        self.command("gc", NAME, "--keep", "99")
        if version != self.model.champion:
            self.model.change(version, line)
            self.model.moves += 1
            assert history(self.registry, NAME)[line]["action"] == "moved"

    def refused_by_writers(self) -> None:
        before = (self.name_folder / "history.jsonl").read_bytes()
        for words in (("rollback", NAME), ("gc", NAME)):
            assert self.command(*words) == "exit 6"
        assert (self.name_folder / "history.jsonl").read_bytes() == before

    def follow_link_command(self, advice: str) -> None:
        command = re.search(r"`ln -sfn (\S+) (\S+)`", advice)
        if command is None:
            assert "remove" in advice
            (self.name_folder / "champion").unlink()
            return
        Path(command[2]).unlink()
        Path(command[2]).symlink_to(command[1])

    def damage_record(self) -> None:
        """champion.json is lost or cut."""
        path = self.name_folder / "champion.json"
        if not path.exists():
            return
        if self.dice.random() < 0.5:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:20])
        if (
            len(read_ledger(self.name_folder).entries) == 1
            and not path.exists()
            and self.model.champion is None
        ):
            self.command("gc", NAME, "--keep", "99")  # as a crash after the first line leaves it
            return
        advice = self.told()
        written = re.search(r"write (\{[^}]*\}) into champion.json", advice)
        assert written is not None, advice
        path.write_text(written[1])
        self.command("gc", NAME, "--keep", "99")

    def damage_history(self) -> None:
        """A line is edited, removed or added, or the file is lost; it is restored."""
        path = self.name_folder / "history.jsonl"
        if not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        number = self.dice.randrange(len(lines))
        how = self.dice.choice(("edited", "removed", "doubled", "lost", "torn tail"))
        if how == "torn tail":
            path.write_bytes(b"".join(lines) + b'{"action": "prom')
            assert audit(self.registry, NAME).is_sound
            self.command("gc", NAME, "--keep", "99")
            return
        if how == "lost":
            path.unlink()
        else:
            edited = lines[number].replace(b'"by": "', b'"by": "x')
            changed = {"edited": [edited], "removed": [], "doubled": [lines[number]] * 2}[how]
            path.write_bytes(b"".join([*lines[:number], *changed, *lines[number + 1 :]]))
        assert re.search("[Rr]estore|backup", self.told())
        assert self.command("rollback", NAME) == "exit 6"
        self.restore("history.jsonl")

    def damage_judgement(self) -> None:
        """A judgement is edited or lost."""
        self.command("gc", NAME, "--keep", "99")  # a writer, which removes what no line names
        files = sorted((self.name_folder / "judgements").glob("*/*.json"))
        if not files:
            return
        path = self.dice.choice(files)
        version = path.parent.name
        path.parent.chmod(0o755)
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-3])
        assert "promote RUN_DIR" in self.told()
        self.promote_again(version, self.folder / "nothing", "judgements")
        self.reread_verdicts(version)

    def damage_policy(self) -> None:
        """policy.json is edited, and written anew by the command."""
        path = self.name_folder / "policy.json"
        path.write_text(json.dumps({"promote": "always", "other": 1}))
        assert "writes it anew" in self.told()
        mode = self.model.policy.get("promote") or "better"
        self.command("policy", NAME, "--promote", mode)
        self.model.policy = {**self.model.policy, "promote": mode}

    def damage_by_an_old_backup(self) -> None:
        """The whole folder is put back as it was some steps ago."""
        saved = copy.deepcopy(self.model)
        old = self.folder / "old"
        shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(self.name_folder, old, symlinks=True)
        for _ in range(3):
            self.step()
        shutil.rmtree(self.name_folder)
        shutil.copytree(old, self.name_folder, symlinks=True)
        self.model = saved

    # The whole

    def step(self) -> None:
        if not self.model.verdicts:
            name = "step_register"
        else:
            name = self.dice.choice([each for each in dir(self) if each.startswith("step_")])
        self.log.append(name)
        self.seen[name] += 1
        getattr(self, name)()

    def check(self) -> None:
        """The registry is sound, and is what the model says."""
        report = audit(self.registry, NAME)
        assert report.is_sound, report.findings
        assert self.read_state() == self.state_of(self.model)

    def run(self, steps: int = STEPS) -> None:
        for _ in range(steps):
            if self.model.verdicts and self.dice.random() < DAMAGED_SHARE:
                self.damage()
            else:
                self.step()
            self.check()


def run_sequences(count: int, seed: int) -> Counter[str]:
    """Run sequences with seeds from `seed` on; what they did. An error names its sequence."""
    seen: Counter[str] = Counter()
    for number in range(seed, seed + count):
        folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        sequence = Sequence(folder, number)
        try:
            sequence.run()
        except BaseException as error:
            error.add_note(f"sequence {number} in {folder}: {', '.join(sequence.log)}")
            raise
        seen += sequence.seen
        shutil.rmtree(folder)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    promotion_outcome.UNPROMOTED_GRACE_TIME = timedelta(0)  # a gc takes what is new, too
    start = time.monotonic()
    seen = run_sequences(given.sequences, given.seed)
    for name, count in sorted(seen.items()):
        print(f"{count:6} {name}")
    print(f"{given.sequences} sequences in {time.monotonic() - start:.0f} s: none failed")


if __name__ == "__main__":
    main()
