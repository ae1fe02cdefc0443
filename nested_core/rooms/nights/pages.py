"""An adapter's pages: one night's own, the lead's of the last ones, and the champion's."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from uuid import UUID

from nested_core.config.schema import FineTuneConfig
from nested_core.records.dataset import DatasetReport, Severity
from nested_core.records.outcome_names import Outcome
from nested_core.records.run_status import Run
from nested_core.records.verdict import TaskResult, Verdict
from nested_core.records.verdict_table import check_table
from nested_core.registry import history, read_version_verdicts
from nested_core.registry.ledger import describe_author
from nested_core.registry.queries import parent_version_of
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.report.outcome import find_outcome
from nested_core.report.run_report import list_answers
from nested_core.storage.run_directory import find_run_of
from nested_core.text.digest_format import shorten_digest
from nested_core.text.document import Cell, Code, Document, Facts, Figures, Section, Table, Text
from nested_core.text.loss_format import join_units
from nested_core.text.svg_chart import Chart, Curve, Point

CRASHED_RUN_NOTE = (
    "A run whose state is Crashed or Cancelled ended before it could write so here: Retry "
    "continues from its last checkpoint."
)
MAX_SHOWN_CHECKS = 4
PROBLEMS: tuple[Severity, ...] = ("error", "warning")  # findings that are more than a figure
COLUMNS = ("run", "outcome", "loss", "right", "min", "rows")
MAX_WIDTH = 28  # of a cell: all columns are to be seen in 710 pixels, which one UI of Prefect has
HOW_TO_READ = (
    "Losses ({units} on the examples of the gate) and right answers (of all eval sets): the "
    "candidate's, then the champion's. Rows: trained on + held out; * other held-out rows, or "
    "another loss, than in the run before. Min: minutes."
)
MAX_SHOWN_CHANGES = 15
VERBS = {"promote": "promoted", "rollback": "rolled back to", "moved": "link moved by hand to"}
CHANGE_COLUMNS = ("when (UTC)", "what", "version", "verdict when registered", "by")


def join_lines(message: str) -> str:
    """Return the message on one line; an error in a data set lists what was found, a line each."""
    joined = ""
    for line in filter(None, map(str.strip, message.splitlines())):
        separator = "" if not joined else " " if joined.endswith((".", ":")) else "; "
        joined += f"{separator}{line}"
    return joined


def describe_night(config: FineTuneConfig, run: Run, outcome: str, message: str) -> Document:
    """Return the page of a run, from those files of its directory that exist.

    outcome, message: the name and the message of the flow run's state.
    """
    verdict = run.verdict
    yet = " yet" if outcome == Outcome.RUNNING else ""
    facts = [
        ("Outcome", join_lines(message)),
        ("Loss", f"not measured{yet}" if verdict is None else verdict.describe_losses()),
        ("Data", _describe_data(config, run.dataset)),
        ("Made of", _describe_model_and_digests(config, run.dataset, verdict)),
        ("Run folder", f"{run.path.resolve()} on the worker's machine"),
    ]
    config_file = shlex.quote(str(run.folder.config.resolve()))
    command = f"nested-tune train --run-dir again \\\n  -c {config_file}"
    answers = Section("Answers", list_answers(run))
    return Document(
        f"{config.registry.name or 'Fine-tune'}: {outcome}",
        [
            Facts(facts),
            *([] if verdict is None else [check_table(verdict)]),
            *([Text(CRASHED_RUN_NOTE)] if yet else []),
            Text("The same again, on that machine:"),
            Code("Command", command),
            answers,
        ],
    )


def _describe_data(config: FineTuneConfig, dataset: DatasetReport | None) -> str:
    """Return one line: the data, the number of examples of each split, and the findings."""
    source = str(config.data)
    if dataset is None:
        return f"{source}, not read yet"
    rows = ", ".join(f"{split.rows:,} {name}" for name, split in dataset.splits.items())
    counts = dataset.counts
    totals = ", ".join(f"{counts[kind]} {kind}" for kind in PROBLEMS if counts[kind])
    checks = sorted({finding.check for finding in (*dataset.errors, *dataset.warnings)})
    names = f" ({', '.join(checks[:MAX_SHOWN_CHECKS])})" if checks else ""
    return f"{source}: {rows} examples; {totals or 'no error and no warning'}{names}"


def _describe_model_and_digests(
    config: FineTuneConfig, dataset: DatasetReport | None, verdict: Verdict | None
) -> str:
    """Return one line: the model, where training started, its main settings, and all digests.

    These are the settings in which two nights of an adapter differ most often.
    """
    parts = [f"model {config.model}"]
    if verdict is not None:
        parts.append(f"from {_describe_initial_adapter(config, verdict.initial.digest)}")
    parts.append(f"{config.length}, learning rate {config.learning_rate:g}, seed {config.seed}")
    if config.registry.name is not None:
        parts.append(f"registry.promote: {config.registry.promote}")
    if dataset is not None:
        parts.append(f"data {shorten_digest(dataset.digest)}")
    if verdict is not None:
        parts.append(f"initial adapter {shorten_digest(verdict.initial.digest)}")
        parts.append(f"adapter {shorten_digest(verdict.trained.digest)}")
    return ", ".join(parts)


def _describe_initial_adapter(config: FineTuneConfig, digest: str) -> str:
    parent = parent_version_of(config, digest)
    if parent is not None:
        return f"version {shorten_digest(parent)}"
    given = config.resume_adapter_file
    return "a fresh adapter" if given is None else f"the adapter {given}"


@dataclass(frozen=True)
class Night:
    """A night as the server knows it: its flow run, when it was due (UTC), and what became of it.

    minutes: how long it took, or has taken so far.
    """

    flow_run: UUID
    due: datetime
    outcome: str | None
    minutes: float


@dataclass(frozen=True)
class _NightFigures:
    """What the files of a run say of its night; None if it did not come so far.

    outcome: where it is not what the night ended with, for its champion was rolled back since.
    """

    outcome: str | None = None
    conclusion: str | None = None
    loss: float | None = None
    unit: str | None = None
    champion_loss: float | None = None
    answers: str | None = None
    examples: str | None = None
    judged_on: tuple[str, object] | None = None  # the rows, and what their loss is made of


def describe_nights(
    name: str, nights: Sequence[Night], links: Sequence[tuple[str, str]]
) -> Document:
    """Return the page of an adapter's runs: a chart of the losses, a table, and links.

    nights: the latest first, as in the table. An asterisk marks a night that was
        judged by other examples, or another loss, than the night before it.
    links: text and path of each further page.
    """
    figures = [_read_figures(night) for night in nights]
    dates = [f"{night.due:%d %b %H:%M}" for night in nights]
    units = join_units(each.unit for each in figures)
    rows = []
    last_basis = None
    for night, date, seen in zip(nights[::-1], dates[::-1], figures[::-1], strict=True):
        is_changed = None not in (last_basis, seen.judged_on) and last_basis != seen.judged_on
        last_basis = seen.judged_on or last_basis
        rows.append(
            (
                Cell(date, path=f"/runs/flow-run/{night.flow_run}"),
                ": ".join(filter(None, (seen.outcome or night.outcome, seen.conclusion))),
                _join_two(seen.loss, seen.champion_loss),
                seen.answers,
                f"{night.minutes:.1f}",
                f"{seen.examples}*" if is_changed else seen.examples,
            )
        )
    return Document(
        f"{name}: the last runs",
        [
            Figures([[_draw_losses(dates[::-1], figures[::-1], units)]]),
            Table(HOW_TO_READ.format(units=units), COLUMNS, rows[::-1], MAX_WIDTH),
            Facts([(f"Newest {text} page", Cell("open", path=path)) for text, path in links]),
        ],
    )


def _draw_losses(dates: Sequence[str], figures: Sequence[_NightFigures], units: str) -> Chart:
    """Return a chart of the losses of candidate and champion over the nights, the oldest first.

    A curve ends at the last night before one whose loss is of another kind, such as a preference's.
    """
    measured = [(n, seen.judged_on[1]) for n, seen in enumerate(figures) if seen.judged_on]
    stretches = [[night for night, _ in nights] for _, nights in groupby(measured, itemgetter(1))]
    candidate = [each.loss for each in figures]
    champion = [each.champion_loss for each in figures]
    curves = []
    for name, losses in (("candidate", candidate), ("champion", champion)):
        for nights in stretches:
            points = [Point(n + 1, losses[n]) for n in range(nights[0], nights[-1] + 1)]
            until = "" if nights is stretches[-1] else f", another loss until {dates[nights[-1]]}"
            curves.append(Curve(f"{name}{until}", points, has_dots=True))
    last = "" if len(dates) == 1 else f", {len(dates)} is {dates[-1]}"
    axis = f"run, 1 is {dates[0]}{last}"
    return Chart("Loss", axis, units, curves)


def _read_figures(night: Night) -> _NightFigures:
    """Return a night's figures from its run's folder; empty ones if that is not on this machine."""
    folder = find_run_of(night.flow_run)
    run = None if folder is None else Run(folder)
    if run is None or run.dataset is None:
        return _NightFigures()
    splits, verdict = run.dataset.splits, run.verdict
    trained_on = str(splits["train"].rows if "train" in splits else 0)
    if verdict is None:
        reason = None if run.skip is None else run.skip.reason
        return _NightFigures(conclusion=reason, examples=trained_on)
    losses, champion = verdict.validation, verdict.champion
    compared = champion or losses
    conclusion: str | None = None if compared is None else compared.conclusion
    needed = 0.0 if run.config is None else run.config.registry.min_improvement
    is_too_little = night.outcome == Outcome.KEPT_CHAMPION and conclusion == "better"
    if compared is not None and is_too_little and -(compared.difference or 0.0) <= needed:
        conclusion = f"better, by less than {needed:g}"
    if conclusion is not None and (verdict.doubtful_answers or not verdict.tasks):
        of_answers = ", not its answers" if verdict.doubtful_answers else ""
        conclusion = conclusion.replace("better", f"better loss{of_answers}")
    was_champion = night.outcome in (Outcome.PROMOTED, Outcome.APPROVED)
    is_rolled_back = was_champion and find_outcome(run) == Outcome.ROLLED_BACK
    rows = splits.get("test") or splits.get("valid")
    return _NightFigures(
        outcome=f"{night.outcome}, then {Outcome.ROLLED_BACK}" if is_rolled_back else None,
        conclusion=None if conclusion is None else conclusion.replace("_", " "),
        loss=None if losses is None else losses.loss_after,
        unit=None if losses is None else losses.unit,
        champion_loss=None if champion is None else champion.loss,
        answers=_count_right(verdict),
        examples=trained_on if losses is None else f"{trained_on}+{losses.examples}",
        judged_on=None if losses is None or rows is None else (rows.digest, run.loss_made_of),
    )


def _join_two(candidate: float | None, champion: float | None) -> str | None:
    """Write `0.0764 / 0.0547`: the candidate's figure, and the champion's."""
    if candidate is None:
        return None
    return f"{candidate:.3g} / {'-' if champion is None else f'{champion:.3g}'}"


def _count_right(verdict: Verdict) -> str | None:
    """Write `12 / 13 of 15`: right answers to all suites, the candidate's and the champion's."""
    if not verdict.tasks:
        return None
    candidate = _sum_right(verdict.tasks, [task.candidate for task in verdict.tasks])
    champion = _sum_right(verdict.tasks, [task.champion for task in verdict.tasks])
    return f"{candidate} / {champion} of {sum(task.questions for task in verdict.tasks)}"


def _sum_right(tasks: Sequence[TaskResult], shares: Sequence[float | None]) -> str:
    if None in shares:
        return "-"
    right = sum((share or 0) * task.questions for share, task in zip(shares, tasks, strict=True))
    return f"{round(right, 2):g}"


def describe_champion(registry: Path, name: str, version: str, verdict: Verdict) -> Document:
    """Return the champion's page: its verdict, what it was made of, and the champions before it.

    version: the champion.
    verdict: its first verdict, from its gate.json.

    Raises DamagedError for a provenance.json that is not as it was written.
    """
    provenance = read_provenance(version_folder(registry, name, version))
    config = provenance.get("config") or {}
    parent, dataset = provenance.get("parent"), provenance.get("dataset_digest")
    facts = [
        ("Loss at its verdict", verdict.describe_losses()),
        ("Registered (UTC)", format_minute(provenance.get("registered_at"))),
        ("Run folder", str(provenance.get("run_dir"))),
        ("Data set", f"{config.get('data')}, {shorten_digest(dataset or 'unknown')}"),
        ("Base model", str(config.get("model"))),
        ("Parent", "a fresh adapter" if parent is None else shorten_digest(parent)),
        ("Registry", str(registry.resolve() / name)),  # two registries may have the same name
    ]
    return Document(
        f"{name}: champion {shorten_digest(version)}",
        [
            Facts(facts),
            check_table(verdict),
            Section("Champions so far", [Table("", CHANGE_COLUMNS, _list_changes(registry, name))]),
        ],
    )


def _list_changes(registry: Path, name: str) -> list[tuple[object, ...]]:
    """Return the last changes of the champion as rows of a table, the latest first."""
    changes = [line for line in history(registry, name) if line["action"] in VERBS]
    verdicts = read_version_verdicts(registry, name).items()
    losses = {version: verdict.describe_losses() for version, verdict in verdicts}
    return [
        (
            format_minute(line["time"]),
            VERBS[line["action"]],
            shorten_digest(line["version"] or "none"),
            losses.get(line["version"]),
            describe_author(line),
        )
        for line in changes[: -MAX_SHOWN_CHANGES - 1 : -1]
    ]


def format_minute(time: object) -> str:
    """Format `2026-11-21T16:19:28.123456+00:00` to the minute, as the history shows it."""
    return str(time)[:16].replace("T", " ")
