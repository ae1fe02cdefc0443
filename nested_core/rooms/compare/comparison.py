"""Several runs beside each other: what differs in settings, losses, verdicts, answers and speed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nested_core.config.key_properties import iterate_configured_paths
from nested_core.config.sections import TaskSection
from nested_core.errors import ConfigError
from nested_core.records.answers import shown_answer
from nested_core.records.paired_difference import PairedDifference
from nested_core.records.run_status import Run, read_run
from nested_core.report.outcome import (
    describe_end,
    describe_outcome,
    list_figures,
    measure_speed,
    run_to_json,
)
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.document import Block, Document, Figures, Section, Table, Text
from nested_core.text.loss_format import format_difference, join_units
from nested_core.text.svg_chart import Chart, Curve

MAX_SHOWN_QUESTIONS = 20


@dataclass(frozen=True, repr=False)
class RunComparison:
    """Runs beside each other, in the order given; in a notebook it shows itself.

    runs: as they were read.
    """

    runs: tuple[Run, ...]

    @property
    def names(self) -> list[str]:
        """The shortest end of each run's path that no other run has."""
        paths = [run.path.resolve().parts for run in self.runs]
        for length in range(1, max(map(len, paths)) + 1):
            names = ["/".join(path[-length:]) for path in paths]
            if len(set(names)) == len(set(paths)):
                break
        return names

    def differing_settings(self) -> dict[str, list[Any]]:
        """Return the keys of the configuration that differ, each with the values of all runs.

        If some runs do not have a suite of `gate.tasks`, its keys are listed only where another run
        sets them to something else than the default.
        """
        settings = [_flatten_config(run) for run in self.runs]
        keys = dict.fromkeys(key for values in settings for key in values)
        columns = {key: [values.get(key) for values in settings] for key in keys}
        return {
            key: values
            for key, values in columns.items()
            if any(value != values[0] for value in values)
            and not (
                any(key not in flat for flat in settings)
                and all(value in (None, _default_of_suite(key)) for value in values)
            )
        }

    def reasons_not_paired(self) -> list[str | None]:
        """Say why each run's losses cannot be compared with the first one's; None if they can."""
        return [None, *(_why_not_comparable(self.runs[0], run) for run in self.runs[1:])]

    def paired_with_first(self) -> list[PairedDifference | None]:
        """Return, for each run, its losses minus the first run's; below 0 is better.

        See `_compare`. None for the first run, and for runs whose losses cannot be compared
        with it.
        """
        return [
            None if number == 0 or reason is not None else _compare(self.runs[0], run)
            for number, (run, reason) in enumerate(
                zip(self.runs, self.reasons_not_paired(), strict=True)
            )
        ]

    def tasks(self) -> dict[str, list[float | None]]:
        """Return the share of right answers of each run's adapter, by suite."""
        shares = [
            {} if r.verdict is None else {task.name: task.candidate for task in r.verdict.tasks}
            for r in self.runs
        ]
        names = dict.fromkeys(name for own in shares for name in own)
        return {name: [own.get(name) for own in shares] for name in names}

    def speed(self) -> dict[str, list[float | None]]:
        """Return tokens a second (median of the reports), seconds of training, and peak memory."""
        return _join([measure_speed(run) for run in self.runs])

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values: a list has one value for each run."""
        return {
            "runs": [run_to_json(run) for run in self.runs],
            "config": self.differing_settings(),
            "tasks": self.tasks(),
            "speed": self.speed(),
            "difference_to_first": [pair and pair.to_json() for pair in self.paired_with_first()],
            "no_difference_because": self.reasons_not_paired(),
        }

    def rows(self) -> Iterator[tuple[object, ...]]:
        """Return a row for each figure, then for each key that differs: its name, a value a run."""
        end, checks, training = map(_join, zip(*map(list_figures, self.runs), strict=True))
        differences = [*map(_describe_difference, self.paired_with_first())]
        figures = end | checks | {"difference to the first": differences} | training
        for name, values in figures.items():
            yield (name, *values)
        for key, values in self.differing_settings().items():
            yield (key, *(None if value is None else str(value) for value in values))

    def describe(self) -> Document:
        """Return the page: outcomes, figures and settings, curves, and answers that differ."""
        pairs = zip(self.names, self.runs, strict=True)
        outcomes = [(name, describe_outcome(run), describe_end(run)) for name, run in pairs]
        each = Table("What became of each run", ("run", "outcome", "verdict"), outcomes)
        return Document(
            f"{len(self.runs)} runs compared",
            [
                Section("Outcomes", [each, *self.describe_damage()], "outcomes"),
                Section("Figures and settings", self.describe_figures(), "figures"),
                Section("Losses", [Figures(list(self._loss_figures()))], "curves"),
                Section("Answers that differ", [self._list_answers()], "answers"),
            ],
        )

    def to_html(self) -> str:
        """Return the whole page."""
        return self.describe().to_html()

    def __repr__(self) -> str:
        runs = zip(self.names, self.runs, strict=True)
        return f"RunComparison({', '.join(f'{name}: {own.state}' for name, own in runs)})"

    def _repr_html_(self) -> str:
        return self.describe().to_fragment()

    def describe_damage(self) -> list[Block]:
        """Return a line for each file that is damaged."""
        return [Text(f"Damaged: {p}", "bad") for run in self.runs for p in run.problems]

    def describe_figures(self) -> list[Block]:
        """Return the figures and the settings that differ, a column for each run."""
        caption = (
            f"Losses in {self._loss_units()}, differences with their 95 % interval, and the "
            f"settings that differ"
        )
        warnings = [
            Text(
                f"The loss of {name} is no comparison with that of {self.names[0]}: {why}.", "warn"
            )
            for name, why in zip(self.names, self.reasons_not_paired(), strict=True)
            if why is not None
        ]
        return [*warnings, Table(caption, ("", *self.names), list(self.rows()))]

    def _loss_units(self) -> str:
        """Return the units of the runs' losses: `nats/token`, or `nats/example and nats/token`."""
        return join_units(run.loss_unit for run in self.runs)

    def _loss_figures(self) -> Iterator[list[Chart]]:
        for title, key in (("Validation loss", "val_loss"), ("Training loss", "loss")):
            for x in ("step", "seconds of training"):
                curves = [
                    Curve(name, run.points(key, x), has_dots=key == "val_loss")
                    for name, run in zip(self.names, self.runs, strict=True)
                ]
                yield [Chart(title, x, self._loss_units(), curves)]

    def _list_answers(self) -> Block:
        """Return a table of the questions that the runs answered differently, or a sentence."""
        answers: dict[str, list[str | None]] = {}
        for column, run in enumerate(self.runs):
            for answer in run.answers:
                if answer.model == "candidate":
                    question = f"{answer.task}: {answer.question}"
                    key = f"{answer.line} of {question}"
                    cells = answers.setdefault(key, [None] * len(self.runs))
                    cells[column] = f"{answer.score:.2g}: {shown_answer(answer.answer)}"
        rows = [(key, *cells) for key, cells in answers.items() if len(set(cells)) > 1]
        if not rows:
            return Text("None: no question was asked, or all were answered alike.")
        caption = f"Score and answer of each run's adapter, {len(rows)} questions"
        return Table(caption, ("question", *self.names), rows[:MAX_SHOWN_QUESTIONS])


def _flatten_config(run: Run) -> dict[str, Any]:
    """Return the configuration of a run by dotted keys, such as `gate.max_kl`; empty if damaged.

    Keys of a suite have its name in place of its number: `gate.tasks.facts.min`.
    """
    flat: dict[str, Any] = {}

    def add(prefix: str, values: dict[str, Any]) -> None:
        """Add the values of a section to `flat`, their keys after `prefix`."""
        for name, value in values.items():
            if isinstance(value, dict) and value:
                add(f"{prefix}{name}.", value)
            elif prefix + name == "gate.tasks":
                add("gate.tasks.", {task.pop("name"): task for task in value})
            else:
                flat[prefix + name] = value

    config = run.config
    if config is None:
        return flat
    add("", config.model_dump(mode="json", by_alias=True))
    if config.training.epochs is not None:
        del flat["iters"]  # epochs are set, so it was not used
    suites = {f"gate.tasks[{n}].file": task.name for n, task in enumerate(config.gate.tasks)}
    for key, rule, path in iterate_configured_paths(config):
        if rule == "local" or Path(path).exists():
            name = f"gate.tasks.{suites[key]}.file" if key in suites else key
            flat[name] = os.path.realpath(path)  # one folder by two spellings is no difference
    return flat


def _default_of_suite(key: str) -> object:
    """Return the default of a suite's key, in the form of the configuration's JSON."""
    if not key.startswith("gate.tasks."):
        return None
    suite = TaskSection(name="a", file="a", score="exact").model_dump(mode="json")
    return suite.get(key.rpartition(".")[2])


def _join(figures: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Collect each run's figure by name; None for a run without a figure of that name."""
    names = dict.fromkeys(name for own in figures for name in own)
    return {name: [own.get(name) for own in figures] for name in names}


def _why_not_comparable(first: Run, other: Run) -> str | None:
    """Explain why the gate's losses of two runs cannot be compared; None if they can."""
    one, two = first.loss_made_of, other.loss_made_of
    if one is None or two is None or None in (one["base model"], one["tokenizer"]):
        return "what it is made of is not known"
    if differing := [name for name, value in one.items() if two[name] != value]:
        return f"it has another {', '.join(differing)}"
    if first.held_out_digest is None or other.held_out_digest != first.held_out_digest:
        return "it may have been measured on different held-out examples"
    return None if _compare(first, other) is not None else "no finite losses of the same examples"


def _compare(first: Run, second: Run) -> PairedDifference | None:
    """Compare the held-out losses of two runs: the second's less the first's, example by example.

    Examples that either run was trained on (`left_out`) do not count. The interval is the gate's.
    Returns None if a run has no losses, or the two are not of the same examples and tokens.
    """
    losses = [run.losses for run in (first, second) if run.losses is not None]
    if len(losses) < 2 or not np.array_equal(losses[0].lines, losses[1].lines):
        return None
    masks = [one.left_out for one in losses if one.left_out is not None]
    is_trained_on = np.any([np.zeros(len(losses[0]), np.bool_), *masks], axis=0)
    base, compared = (one.leaving_out(is_trained_on).counted() for one in losses)
    if not np.array_equal(base.tokens, compared.tokens):
        return None
    return compared.compare_trained_with(base.after)


def _describe_difference(difference: PairedDifference | None) -> str | None:
    if difference is None:
        return None
    interval = (difference.low, difference.high) if difference.is_measurable else None
    return format_difference(difference.mean, interval)


def compare_runs(run_dirs: Sequence[str | Path]) -> RunComparison:
    """Read the runs in `run_dirs`, to be compared with the first of them.

    Raises ConfigError for none, or for what is no run directory.
    """
    if not run_dirs:
        raise ConfigError("There is no run to compare. Give the run directories, one or more.")
    return RunComparison(tuple(read_run(RunDirectory(Path(path))) for path in run_dirs))
