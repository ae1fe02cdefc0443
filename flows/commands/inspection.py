"""verify, status, stop, report and runs: what is on disk, looked at from outside."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.adapter_places import add_registry_flag
from flows.commands.command_output import add_output_flag, printer, result_printer, text_printer
from flows.commands.help_pages import Commands
from flows.terminal.console import print_line, print_progress, print_table
from nested_core.errors import ConfigError, DamagedError, GateRejected
from nested_core.pipeline.named_adapters import find_bare_name, find_named_adapter, name_folder_of
from nested_core.storage.output_places import require_output_file
from nested_core.storage.run_directory import DEFAULT_RUNS_FOLDER, RunDirectory
from nested_core.text.foreign_text import escape
from nested_core.text.groups import grouped

if TYPE_CHECKING:
    from nested_core.records.run_status import Run
    from nested_core.records.verdict import TensorChange

MODULE_COLUMNS = ("module", "tensors changed", "least change", "most (relative)", "finite")


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    usage, example = "%(prog)s INITIAL TRAINED [--json]", "runs/first/initial runs/first/adapter"
    verify = commands.add("verify", run_verify, "Inspect", example, json=True, usage=usage)
    forms = "INITIAL and TRAINED: names, runs or folders"
    verify.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER", help=forms)
    add_registry_flag(verify)
    verify.add_argument("--all", action="store_true", help="a row for each tensor, too")
    status = commands.add("status", run_status, "Inspect", "runs/first", json=True)
    status.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    stop = commands.add("stop", run_stop, "Train", "runs/first")
    stop.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report = commands.add("report", run_report, "Inspect", "runs/first")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    add_output_flag(report, "default: RUN_DIR/report.html")
    runs = commands.add("runs", run_listing, "Inspect", json=True)
    runs.add_argument("folder", nargs="?", type=Path, default=DEFAULT_RUNS_FOLDER, metavar="DIR")


def run_verify(arguments: argparse.Namespace) -> Callable[[], int]:
    """Compare two adapters: what training changed."""
    if len(arguments.adapters) != 2:
        raise ConfigError(
            f"verify takes two adapters, INITIAL and TRAINED; given: {len(arguments.adapters)}. To "
            f"audit adapters without an initial one, add --model BASE."
        )
    from nested_core.gate.judge import verify_adapters

    initial, trained = (find_folder(path, arguments.registry) for path in arguments.adapters)
    verdict = verify_adapters(initial, trained)

    def show() -> None:
        """The verdict in a line, what became of each module, and with --all of each tensor."""
        print_line(verdict.summary())
        print_table(MODULE_COLUMNS, list(summarise_by_module(verdict.tensors)))
        if arguments.all:
            rows = [(t.name, t.changed, t.relative_delta, t.finite) for t in verdict.tensors]
            print_table(("tensor", "changed", "relative change", "finite"), rows)
        else:
            print_line(f"--all shows the {len(verdict.tensors)} tensors, --json everything.")

    code = 0 if verdict.has_passed else GateRejected.exit_code
    return result_printer(arguments, verdict.to_json, show, code)


def find_folder(given: Path, registry: Path | None) -> Path:
    """The adapter's folder of a run or a name; any other path as it is, for the gate to look at."""
    is_path = registry is None and given.exists()
    is_name = not is_path and find_bare_name(given, registry) is not None
    if is_name or name_folder_of(given) is not None or RunDirectory(given).config.is_file():
        return find_named_adapter(given, registry).folder
    return given


def summarise_by_module(tensors: Iterable[TensorChange]) -> Iterator[tuple[object, ...]]:
    """A row for the tensors that share a module's name in all layers, as in MODULE_COLUMNS.

    `model.layers.3.self_attn.q_proj.lora_a` and those of the other layers are one row,
    `self_attn.q_proj.lora_a`.
    """
    named = ((re.sub(r"^.*?\blayers\.\d+\.", "", tensor.name), tensor) for tensor in tensors)
    for module, group in grouped(named).items():
        deltas = [t.relative_delta for t in group if t.relative_delta is not None]
        smallest, largest = (min(deltas), max(deltas)) if deltas else (None, None)
        changed = f"{sum(t.changed for t in group)} of {len(group)}"
        yield module, changed, smallest, largest, all(t.finite for t in group)


def run_status(arguments: argparse.Namespace) -> Callable[[], int]:
    """Show how far a run is and what came of it.

    DamagedError for a damaged configuration or verdict.
    """
    from nested_core.records.run_status import Run
    from nested_core.report.outcome import run_to_json

    run = Run(RunDirectory(arguments.run_dir))
    run.folder.require_begun()
    status = run_to_json(run)
    if run.state == "damaged":
        raise run.errors[0]
    for problem in run.problems:
        print_progress(f"warning: {problem}")
    status["run_dir"] = status["path"]
    status["checkpoint"] = run.find_checkpoint()
    status |= {f"current_{name}": status[name] for name in ("train_loss", "val_loss")}

    def show() -> None:
        """A row a figure, each loss with its data and step; what is not known has no row."""
        print_table(("", ""), [row for row in _describe_status(run, status) if row[1] is not None])

    return result_printer(arguments, lambda: status, show)


def _describe_status(run: Run, status: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """The figures of a run, and what only counts while it goes on."""
    from nested_core.report.outcome import list_figures

    yield "run", run.path
    yield "process", run.process
    yield "nothing trained", None if run.skip is None else escape(run.skip.describe())
    for figures in list_figures(run):
        yield from figures.items()
    if status["iteration"] != (run.last("step") or 0):  # gradients are accumulated over several
        yield "iterations", status["iteration"]
    yield "learning rate", status["learning_rate"]
    updates = status["updates"] or ()
    if len(updates) > 1:
        yield "updates of each tier", ", ".join(map(str, updates))
    yield "newest checkpoint", status["checkpoint"]


def run_stop(arguments: argparse.Namespace) -> Callable[[], int]:
    """Stop a run after a checkpoint."""
    run = RunDirectory(arguments.run_dir)
    run.require_begun()
    holder = run.holder()
    if holder is None:
        raise ConfigError(f"{run.path} is not being trained by any process: nothing to stop.")
    run.stop_request.touch()
    return text_printer(
        f"asked process {holder} to stop: after its current step, or within seconds where "
        "it is not training"
    )


def run_report(arguments: argparse.Namespace) -> Callable[[], int]:
    """Write a run's page, report.html.

    Exit 6 where a file of the run is damaged, which the page says.
    """
    from nested_core.report.run_report import read_report

    target = RunDirectory(arguments.run_dir).report
    if arguments.output is not None:
        target = require_output_file(arguments.output, "-o", own_run=arguments.run_dir)
    report = read_report(arguments.run_dir)
    report.write(target)
    for problem in report.run.problems:
        print_progress(f"warning: {problem}")

    code = DamagedError.exit_code if report.run.problems else 0
    return printer(lambda: print_line(f"report: {arguments.output or target}"), code)


def run_listing(arguments: argparse.Namespace) -> Callable[[], int]:
    """List the runs of a folder."""
    from nested_core.records.run_status import list_runs
    from nested_core.report.outcome import LIST_COLUMNS, LIST_NOTE, list_row, run_to_json

    runs = list_runs(arguments.folder)

    def show() -> None:
        """A row for each run."""
        if not runs:
            print_line(f"no runs in {arguments.folder}")
            return
        print_table(LIST_COLUMNS, [list_row(run) for run in runs])
        print_line(LIST_NOTE)

    return result_printer(arguments, lambda: {"runs": [run_to_json(run) for run in runs]}, show)
