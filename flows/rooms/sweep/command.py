"""sweep: a search among settings in the time there is, and its winner judged."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from flows.commands.command_output import result_printer
from flows.commands.config_flags import (
    add_config_flags,
    add_run_flags,
    choose_run_dir,
    load_config_from_flags,
)
from flows.process.stop_signals import Stopper
from flows.terminal.console import print_line, print_progress, print_table
from nested_core import backend
from nested_core.config.loading import parse_yaml
from nested_core.errors import ConfigError
from nested_core.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from nested_core.config.schema import FineTuneConfig
    from nested_core.models.session import Session
    from nested_core.records.verdict import Verdict
    from nested_core.rooms.sweep.search import SweepResult


def add_commands(commands: Any) -> None:
    """Add the command."""
    sweep = commands.add("sweep", run_sweep, "Train", "-c lora.yaml --minutes 30", json=True)
    add_config_flags(sweep)
    add_run_flags(sweep)
    sweep.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="values to try of a key; several keys give every combination. Without it learning "
        "rates are tried",
    )
    sweep.add_argument(
        "--select-by",
        default="loss",
        metavar="loss|SUITE",
        help="what chooses: the validation loss, or the answers to a suite of gate.tasks",
    )
    sweep.add_argument("--minutes", type=float, metavar="M", help="time to train in, about")
    sweep.add_argument("--steps", type=int, metavar="N", help="steps of all settings together")


def run_sweep(arguments: argparse.Namespace) -> Callable[[], int]:
    """Try several settings in the time there is, and judge the best."""
    over = _parse_over(arguments.over)
    for name in ("minutes", "steps"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ConfigError(f"sweep --{name} must be above 0; found {value:g}.")
    config = load_config_from_flags(arguments)
    folder = _choose_folder(arguments)
    with backend.collecting_no_garbage():
        from flows.commands.terminal_hooks import TerminalSteps  # loads mlx, which takes seconds
        from nested_core.rooms.sweep.search import SweepRequest, sweep

    stopper = Stopper(ends_process=True)

    class SweepSteps(TerminalSteps):
        """The steps of `train`; a signal stops the trainer of the arm that is being trained."""

        def judge(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> Verdict:
            """Judge an arm; a signal ends the process, since no trainer is left to stop."""
            stopper.release_trainer()
            return super().judge(config, run, session)

    request = SweepRequest(over, arguments.select_by, arguments.minutes, arguments.steps)
    print_progress(f"sweep: {folder}")
    with stopper.handling_signals(RunDirectory(folder)):
        result = sweep(config, folder, request, SweepSteps(stopper))
    return result_printer(arguments, result.to_json, lambda: _show(result))


def _show(result: SweepResult) -> None:
    """Print the arms, the outcome, and how to go on."""
    record = result.record
    rows = [(number, arm.describe(), *arm.last_score()) for number, arm in enumerate(record.arms)]
    print_table(("arm", "setting", "step", f"best {record.select_by}"), rows)
    print_line(result.summary())
    print_line(result.verdict.summary())
    print_line(f"side by side: nested-tune compare {quote(str(result.folder))}/arms/*")
    print_line(f"configuration: {result.folder / 'best.yaml'}")
    advice = "nothing to promote: no setting is shown to be better than the configuration itself"
    if result.is_better:
        advice = f"`nested-tune promote {quote(str(result.run.path))} --name NAME`"
    print_progress(f"next: {advice}")


def _choose_folder(arguments: argparse.Namespace) -> Path:
    """Choose a new or empty folder, or with --resume one in which a sweep has begun."""
    folder = choose_run_dir(arguments, "sweep-")
    has_begun = folder.is_dir() and any(folder.iterdir())
    if has_begun != arguments.resume:
        advice = "is not empty: add --resume" if has_begun else "has no sweep: leave --resume out"
        raise ConfigError(f"{folder} {advice}, or give another --run-dir.")
    return folder


def _parse_over(given: Sequence[str]) -> dict[str, list[Any]]:
    """Parse KEY=V,V into keys with lists of values; ConfigError for anything else."""
    over: dict[str, list[Any]] = {}
    for text in given:
        key, separator, values = text.partition("=")
        parsed = parse_yaml(f"[{values}]", source=f"--over {key}") if separator else None
        if not key or not parsed or key in over:
            raise ConfigError(
                f"--over {text}: expected KEY=V,V with a key once, such as "
                f"--over learning_rate=3e-5,1e-4,3e-4"
            )
        over[key] = parsed
    return over
