"""One spelling of each outcome: on every screen that shows a run, the words are the same."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.commands.inspection import run_listing, run_status
from flows.commands.training import print_result
from flows.terminal.run_results import print_rejection
from nested_core import registry as core
from nested_core.pipeline.finetune import FinetuneResult
from nested_core.records.dataset import Finding
from nested_core.records.outcome_names import Outcome
from nested_core.records.run_status import Run
from nested_core.records.skip import Skip, write_skip
from nested_core.records.verdict import ChampionLoss, Code, JudgedAdapter, Reason
from nested_core.registry.ledger import Origin
from nested_core.registry.link_and_views import writing
from nested_core.registry.policy import set_policy
from nested_core.report.outcome import describe_outcome, find_outcome, find_reason_kept
from nested_core.report.run_report import read_report
from nested_core.seams import is_there, load
from nested_core.storage.run_directory import RunDirectory
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.left_out import needs_rooms
from tests.runs import begin_run, config_of, finished_run, judge, make_losses, make_verdict

NAME = "support-bot"
ROOT = Path(__file__).resolve().parents[2]


def rejected(code: Code) -> Callable[[Path], RunDirectory]:
    return lambda folder: finished_run(folder / "run", reasons=[Reason(code, "why")])


def registered(
    folder: Path, decide: Callable[[Path, str], object], **provenance: Any
) -> RunDirectory:
    """A run whose adapter is a version, about which something is decided."""
    registry = folder / "registry"
    version = register(write_run(folder / "written", 1), registry, NAME, provenance)
    run = finished_run(folder / "run", registry={"path": str(registry), "name": NAME})
    verdict = replace(make_verdict(make_losses()), trained=JudgedAdapter("adapter", version))
    judge(run, verdict, make_losses(), "text")
    decide(registry, version)
    return run


def promoted(folder: Path) -> RunDirectory:
    return registered(folder, lambda registry, v: promote(registry, NAME, v, by="ann"))


def declined(folder: Path) -> RunDirectory:
    def say_no(registry: Path, version: str) -> None:
        with writing(registry, NAME) as held:
            held.record("declined", version, "ann", reason="too curt")

    return registered(folder, say_no)


def rolled_back(folder: Path) -> RunDirectory:
    first = register(write_run(folder / "first", 2), folder / "registry", NAME, {})
    promote(folder / "registry", NAME, first, by="ann")

    def promote_and_go_back(registry: Path, version: str) -> None:
        promote(registry, NAME, version, by="policy", automatic=True)
        core.rollback(registry, NAME, by="ann")

    return registered(folder, promote_and_go_back)


def approved(folder: Path) -> RunDirectory:
    answer = Origin(flow_run="0a", deployment=None)
    return registered(
        folder, lambda registry, v: promote(registry, NAME, v, by="ann", origin=answer)
    )


ASKS = {"champion_at_gate": None, "config": {"registry": {"promote": "approve"}}}


def superseded(folder: Path) -> RunDirectory:
    return registered(
        folder,
        lambda registry, _: register(write_run(folder / "newer", 2), registry, NAME, ASKS),
        **ASKS,
    )


def kept(folder: Path, rise: float = 0.1, **section: str) -> RunDirectory:
    """A run from the champion whose loss rose, or fell, and whose adapter is no version."""
    champion = register(write_run(folder / "written", 1), folder / "registry", NAME, {})
    registry = {"path": str(folder / "registry"), "name": NAME, "promote": "better"} | section
    run = finished_run(folder / "run", registry=registry)
    verdict = make_verdict(make_losses(), with_task=False)
    assert verdict.validation is not None
    after = (verdict.validation.loss_before or 0.0) + rise
    verdict = replace(
        verdict,
        initial=JudgedAdapter("initial", champion),
        champion=ChampionLoss(champion),
        validation=replace(verdict.validation, loss_after=after),
    )
    judge(run, verdict, make_losses(), "text")
    return run


def refused(folder: Path) -> RunDirectory:
    finding = Finding("train.jsonl", 7, "error", "bad-json", "column 46")
    return begin_run(folder / "run", findings=[finding])


def skipped(outcome: Outcome, reason: str) -> Callable[[Path], RunDirectory]:
    def make(folder: Path) -> RunDirectory:
        run = begin_run(folder / "run")
        write_skip(run.skipped, Skip(outcome, reason))
        return run

    return make


def damaged(folder: Path) -> RunDirectory:
    run = finished_run(folder / "run")
    run.gate.write_text("{")
    return run


RUNS: dict[Outcome, Callable[[Path], RunDirectory]] = {
    Outcome.RUNNING: lambda folder: begin_run(folder / "run"),
    Outcome.PROMOTED: promoted,
    Outcome.VERIFIED: lambda folder: finished_run(folder / "run"),
    Outcome.KEPT_CHAMPION: kept,
    Outcome.DECLINED: declined,
    Outcome.ROLLED_BACK: rolled_back,
    Outcome.WAITS_FOR_APPROVAL: lambda folder: registered(folder, lambda *_: None, **ASKS),
    Outcome.APPROVED: approved,
    Outcome.SUPERSEDED: superseded,
    Outcome.SKIPPED_UNCHANGED: skipped(Outcome.SKIPPED_UNCHANGED, "data unchanged since 0a1b"),
    Outcome.SKIPPED_HOPELESS: skipped(Outcome.SKIPPED_HOPELESS, "rejected as worse on 24 Nov 2026"),
    Outcome.DATA_REFUSED: refused,
    Outcome.DAMAGED: damaged,
    Outcome.UNCHANGED: rejected("unchanged"),
    Outcome.UNSOUND: rejected("unreadable"),
    Outcome.WORSE: rejected("loss_regressed"),
    Outcome.HARMED: rejected("examples_harmed"),
    Outcome.ANSWERS: rejected("task_below"),
}


QUESTIONS = (Outcome.WAITS_FOR_APPROVAL, Outcome.SUPERSEDED)


def ask(command: Callable[[argparse.Namespace], Callable[[], int]], **arguments: Any) -> None:
    """Print what a command prints."""
    flags = {"json": False, "output": None, "prune": False, "keep": None, "dry_run": False}
    flags |= {"unregistered": False}
    command(argparse.Namespace(**flags | arguments))()


@pytest.mark.parametrize("state", ["better", "promoted whatever its loss", "first of its name"])
def test_a_run_that_passed_and_ended_before_its_registration_says_so(
    tmp_path: Path, state: str
) -> None:
    if state == "promoted whatever its loss":
        run = kept(tmp_path, promote="always")
    else:
        run = kept(tmp_path, -0.1, name="another" if state == "first of its name" else NAME)
    assert find_outcome(Run(run)) == Outcome.VERIFIED
    said = describe_outcome(Run(run))
    assert said == "Verified: passed, better loss; no questions asked; not registered"
    assert said in " ".join(read_report(run.path).to_html().split())
    assert describe_outcome(Run(kept(tmp_path / "kept"))).startswith("Kept the champion: passed")


def test_a_run_whose_version_waits_in_the_registry_is_not_called_unregistered(
    tmp_path: Path,
) -> None:
    run = registered(tmp_path, lambda *_: None)
    assert describe_outcome(Run(run)).startswith("Verified: passed, better")
    assert "not registered" not in describe_outcome(Run(run))


def test_a_registered_version_that_its_policy_refused_kept_the_champion(tmp_path: Path) -> None:
    for rival, expected in (("0" * 64, Outcome.KEPT_CHAMPION), (None, Outcome.VERIFIED)):
        policy = {"champion_at_gate": rival, "config": {"registry": {"promote": "better"}}}
        run = registered(tmp_path / str(rival), lambda *_: None, **policy)
        assert find_outcome(Run(run)) == expected
        assert (find_reason_kept(Run(run)) is None) == (rival is None)


def test_a_better_version_that_the_policy_never_alone_kept_back_kept_no_champion(
    tmp_path: Path,
) -> None:
    def never(registry: Path, _: str) -> None:
        set_policy(registry, NAME, by="ann", changes={"promote": "never"})

    section = {"registry": {"promote": "better"}}
    run = registered(tmp_path, never, champion_at_gate="0" * 64, config=section)
    assert find_outcome(Run(run)) == Outcome.VERIFIED


@pytest.mark.parametrize(
    "outcome",
    [
        pytest.param(outcome, marks=needs_rooms("approval")) if outcome in QUESTIONS else outcome
        for outcome in RUNS
    ],
)
def test_an_outcome_has_the_same_words_on_every_screen(outcome, tmp_path, capsys) -> None:
    run = RUNS[outcome](tmp_path)
    with ExitStack() as stack:
        if outcome == Outcome.RUNNING:
            stack.enter_context(run.locked())
        assert find_outcome(Run(run)) == outcome
        screens = {"report": read_report(run.path).to_html()}
        shown = {
            "runs": lambda: ask(run_listing, folder=run.path.parent),
            "status": lambda: ask(run_status, run_dir=run.path),
        }
        if is_there("compare"):
            run_compare = load("flows.rooms.compare.command:run_compare")
            shown["compare"] = lambda: ask(run_compare, run_dirs=[run.path])
        for name, show in shown.items():
            if (name, outcome) != ("status", Outcome.DAMAGED):  # which is an error
                show()
                screens[name] = capsys.readouterr().out
        read = Run(run)
        if is_there("nights"):
            describe_night = load("nested_core.rooms.nights.pages:describe_night")
            screens["page"] = str(describe_night(config_of(run), read, outcome, "said"))
        if read.verdict is not None and read.verdict.has_passed and outcome != Outcome.RUNNING:
            print_result(config_of(run), FinetuneResult(run, verdict=read.verdict), ())
            screens["terminal"] = capsys.readouterr().out
        elif read.verdict is not None:
            print_rejection(run)
            screens["terminal"] = capsys.readouterr().out
    missing = [name for name, text in screens.items() if outcome not in " ".join(text.split())]
    assert missing == []
    others = {other for other in Outcome if other not in (outcome, Outcome.RUNNING)}
    beside = [line for line in screens["runs"].splitlines() if "│" in line]
    assert not {other for other in others if any(other in line for line in beside)}


@needs_rooms("export")
def test_the_card_of_a_version_has_the_words_of_what_was_verified() -> None:
    from nested_core.rooms.export.adapter_card import render_card

    card = render_card(NAME, "ab" * 32, {}, make_verdict(make_losses()))
    assert f"{Outcome.VERIFIED}: passed, better; " in card


def test_a_state_of_prefect_is_named_by_an_outcome_and_by_no_words_of_its_own() -> None:
    named = []
    for path in [*(ROOT / "flows").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = getattr(node, "func", None)
            if getattr(called, "id", None) in ("Completed", "Failed", "Cancelled"):
                names = [k.value for k in node.keywords if k.arg == "name"]  # type: ignore[attr-defined]
                named += [(path.name, name) for name in names]
    assert len(named) > (8 if is_there("approval") else 7)  # this room names three of them
    assert [path for path, name in named if isinstance(name, ast.Constant)] == []
