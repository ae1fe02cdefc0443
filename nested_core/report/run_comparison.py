"""Several runs beside each other: what differs in settings, losses, verdicts, answers and speed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from nested_core.config.key_properties import iterate_configured_paths
from nested_core.config.sections import TaskSection
from nested_core.errors import ConfigError
from nested_core.records.answers import shown_answer
from nested_core.records.paired_difference import PairedDifference, compare_pairs
from nested_core.records.run import Run, read_run
from nested_core.report.line_charts import draw_figure
from nested_core.report.run_outcome import describe_outcome, run_to_json
from nested_core.report.run_page import describe_in_a_sentence
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.html_markup import (
    Html,
    element,
    escaped_html,
    notebook_fragment,
    page,
    paragraph,
    section,
    table,
    truncated_text,
)
from nested_core.text.loss_format import format_difference, format_interval
from nested_core.text.svg_chart import Chart, Curve

MAX_SHOWN_QUESTIONS = 20


@dataclass(frozen=True, repr=False)
class RunComparison:
    """Runs beside each other, in the order given; in a notebook it shows itself.

    records: what was read of each run.
    """

    records: tuple[Run, ...]

    @property
    def names(self) -> list[str]:
        """A name for each run, the shortest end of its path that no other run has."""
        paths = [record.path.resolve().parts for record in self.records]
        for length in range(1, max(map(len, paths)) + 1):
            names = ["/".join(path[-length:]) for path in paths]
            if len(set(names)) == len(set(paths)):
                break
        return names

    def differing_settings(self) -> dict[str, list[Any]]:
        """The keys of the configuration whose values differ, with the value of each run.

        Of a suite that a run does not have, the keys that the others set.
        """
        settings = [_flatten_config(record) for record in self.records]
        keys = dict.fromkeys(key for values in settings for key in values)
        columns = {key: [values.get(key) for values in settings] for key in keys}
        return {
            key: values
            for key, values in columns.items()
            if any(value != values[0] for value in values)
            and not (
                any(key not in own for own in settings)
                and all(value in (None, _default_of_suite(key)) for value in values)
            )
        }

    def losses(self) -> dict[str, list[Any]]:
        """The last losses of training and the gate's, in nats a token.

        Beside each stand the file, the number of examples and the step that it is of.
        """
        gates = [None if r.verdict is None else r.verdict.validation for r in self.records]
        paired = self.paired_with_first()
        plans = [record.plan for record in self.records]
        train = [record.last_loss("train_loss") for record in self.records]
        valid = [record.last_loss("val_loss") for record in self.records]
        return {
            "training": [None if last is None else last[1] for last in train],
            "validation": [None if last is None else last[1] for last in valid],
            "not_finite": [
                [
                    name
                    for name, last in (("training", trained), ("validation", evaluated))
                    if last is not None and last[1] is None
                ]
                for trained, evaluated in zip(train, valid, strict=True)
            ],
            "training_file": [None if plan is None else plan.training_file for plan in plans],
            "training_step": [None if last is None else last[0] for last in train],
            "validation_file": [None if plan is None else plan.validation_file for plan in plans],
            "validation_examples": [
                None if plan is None else plan.validation_examples for plan in plans
            ],
            "validation_step": [None if last is None else last[0] for last in valid],
            "gate_file": [None if gate is None else gate.file for gate in gates],
            "gate_examples": [None if gate is None else gate.examples for gate in gates],
            "gate_step": [
                None if r.verdict is None else r.verdict.adapter_step for r in self.records
            ],
            "gate_before": [None if gate is None else gate.loss_before for gate in gates],
            "gate_after": [None if gate is None else gate.loss_after for gate in gates],
            "difference_to_first": [None if p is None else p.to_json() for p in paired],
        }

    def paired_with_first(self) -> list[PairedDifference | None]:
        """Each run's losses minus the first one's, example by example; below 0 is better.

        None for the first, and where the two are not known to be judged on the same examples.
        """
        first = self.records[0].losses
        digest = self.records[0].held_out_digest
        differences: list[PairedDifference | None] = [None]
        for record in self.records[1:]:
            own = record.losses
            is_same = (
                own is not None
                and first is not None
                and digest is not None
                and record.held_out_digest == digest
                and np.array_equal(own.lines, first.lines)
                and np.array_equal(own.tokens, first.tokens)
                and np.isfinite([own.after, first.after]).all()
            )
            if is_same and own is not None and first is not None and len(own):
                differences.append(compare_pairs(first.after, own.after, own.tokens))
            else:
                differences.append(None)
        return differences

    def tasks(self) -> dict[str, list[float | None]]:
        """The share of right answers of each run's adapter, by suite."""
        shares = [
            {} if r.verdict is None else {task.name: task.candidate for task in r.verdict.tasks}
            for r in self.records
        ]
        names = dict.fromkeys(name for own in shares for name in own)
        return {name: [own.get(name) for own in shares] for name in names}

    def speed(self) -> dict[str, list[float | None]]:
        """Tokens a second (the median of the reports), seconds of training, and peak memory."""
        return {
            "tokens_per_second": [
                _median_metric(record, "tokens_per_second") for record in self.records
            ],
            "training_seconds": [max(record.seconds, default=None) for record in self.records],
            "peak_memory_gb": [record.last("peak_memory_gb") for record in self.records],
        }

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values: a list has one value for each run."""
        return {
            "runs": [run_to_json(record) for record in self.records],
            "config": self.differing_settings(),
            "losses": self.losses(),
            "tasks": self.tasks(),
            "speed": self.speed(),
            "same_held_out_examples": self.has_same_held_out_examples(),
        }

    def has_same_held_out_examples(self) -> bool:
        """Whether the losses are known to be of the same examples, and so may be compared."""
        digests = {record.held_out_digest for record in self.records}
        return len(digests) == 1 and None not in digests

    def rows(self) -> Iterator[tuple[object, ...]]:
        """A row for each figure, then for each key that differs: its name, and a value a run."""
        yield ("state", *(record.state for record in self.records))
        yield ("outcome", *map(describe_outcome, self.records))
        yield ("offered: the adapter of step", *(own.offered_step for own in self.records))
        yield ("its validation loss", *(own.offered_val_loss for own in self.records))
        losses = self.losses()
        for name, key in _GATE_ROWS:
            yield (name, *losses[key])
        yield ("difference to the first", *map(_describe_difference, self.paired_with_first()))
        for name, shares in self.tasks().items():
            yield (f"right answers, {name}", *shares)
        yield ("trained", *(r.describe_length() for r in self.records))
        for name, key in _LAST_LOSS_ROWS:
            cells = zip(losses[key], losses["not_finite"], strict=True)
            yield (name, *("not finite" if key in names else value for value, names in cells))
        for name, values in self.speed().items():
            yield (name.replace("_", " "), *values)
        for key, values in self.differing_settings().items():
            yield (key, *(None if value is None else str(value) for value in values))

    def to_html(self) -> str:
        """The whole page."""
        header = element("header", element("h1", f"{len(self.records)} runs compared"))
        return page("Runs compared", header, element("main", *self._sections()))

    def __repr__(self) -> str:
        runs = zip(self.names, self.records, strict=True)
        return f"RunComparison({', '.join(f'{name}: {own.state}' for name, own in runs)})"

    def _repr_html_(self) -> str:
        return notebook_fragment(*self._sections())

    def _sections(self) -> Iterator[Html]:
        outcomes = [
            (name, truncated_text(describe_in_a_sentence(record)))
            for name, record in zip(self.names, self.records, strict=True)
        ]
        problems = [
            element("li", truncated_text(problem)) for r in self.records for problem in r.problems
        ]
        damage = [paragraph("Damaged files:", class_="bad"), element("ul", *problems)]
        yield section(
            "outcomes",
            "Outcomes",
            table("Each run in a sentence", ("run", "outcome"), outcomes),
            *(damage if problems else []),
        )
        yield section("figures", "Figures and settings", *self._number_tables())
        yield section("curves", "Losses", *self._loss_figures())
        yield section("answers", "Answers that differ", *self._answer_tables())

    def _number_tables(self) -> Iterator[Html]:
        if not self.has_same_held_out_examples():
            yield paragraph(
                "These runs are not known to be judged on the same held-out examples: their "
                "losses may be of different data.",
                class_="warn",
            )
        caption = "Losses in nats a token; of the settings those that differ"
        yield table(caption, ("", *self.names), self.rows())

    def _loss_figures(self) -> Iterator[Html]:
        charts = [
            draw_figure([Chart(title, x, "nats a token", list(self._loss_curves(key, x)))])
            for title, key in (("Validation loss", "val_loss"), ("Training loss", "loss"))
            for x in ("step", "seconds of training")
        ]
        yield element("div", *charts, class_="charts")

    def _loss_curves(self, key: str, x: str) -> Iterator[Curve]:
        for name, record in zip(self.names, self.records, strict=True):
            yield Curve(name, record.points(key, x), has_dots=key == "val_loss")

    def _answer_tables(self) -> Iterator[Html]:
        answers: dict[tuple[str, int], list[Html]] = {}
        questions: dict[tuple[str, int], str] = {}
        for place, record in enumerate(self.records):
            for answer in record.answers:
                if answer.model == "candidate":
                    key = (answer.task, answer.line)
                    questions.setdefault(key, f"{answer.task}: {answer.question}")
                    cells = answers.setdefault(key, [escaped_html(None)] * len(self.records))
                    cells[place] = truncated_text(
                        f"{answer.score:.2g}: {shown_answer(answer.answer)}"
                    )
        rows = [
            (truncated_text(questions[key]), *cells)
            for key, cells in answers.items()
            if any(cell != cells[0] for cell in cells)
        ]
        if not rows:
            yield paragraph("None: no question was asked, or all were answered alike.")
            return
        caption = f"Score and answer of each run's adapter, {len(rows)} questions"
        yield table(caption, ("question", *self.names), rows[:MAX_SHOWN_QUESTIONS])


_GATE_ROWS = (
    ("gate's loss after", "gate_after"),
    ("gate's loss before", "gate_before"),
    ("gate's loss: file", "gate_file"),
    ("gate's loss: examples", "gate_examples"),
)
_LAST_LOSS_ROWS = (
    ("training loss, mean of the last report", "training"),
    ("training loss: file", "training_file"),
    ("training loss: at step", "training_step"),
    ("validation loss, last evaluation", "validation"),
    ("validation loss: file", "validation_file"),
    ("validation loss: examples", "validation_examples"),
    ("validation loss: at step", "validation_step"),
)


def _flatten_config(record: Run) -> dict[str, Any]:
    """The configuration of a run by dotted keys; empty where it is damaged.

    A suite's are by its name: `gate.tasks.facts.min`.
    """
    flat: dict[str, Any] = {}

    def add(prefix: str, values: dict[str, Any]) -> None:
        """Add the values of a section."""
        for name, value in values.items():
            if isinstance(value, dict) and value:
                add(f"{prefix}{name}.", value)
            elif prefix + name == "gate.tasks":
                add("gate.tasks.", {task.pop("name"): task for task in value})
            else:
                flat[prefix + name] = value

    config = record.config
    if config is None:
        return flat
    add("", config.model_dump(mode="json", by_alias=True))
    if config.training.epochs is not None:
        del flat["iters"]  # epochs decide: it did not count
    suites = {f"gate.tasks[{n}].file": task.name for n, task in enumerate(config.gate.tasks)}
    for key, rule, path in iterate_configured_paths(config):
        if rule == "local" or Path(path).exists():
            name = f"gate.tasks.{suites[key]}.file" if key in suites else key
            flat[name] = os.path.realpath(path)  # one folder by two spellings is no difference
    return flat


def _default_of_suite(key: str) -> object:
    """What a key of a suite is where it is not set, as the configuration's JSON has it."""
    if not key.startswith("gate.tasks."):
        return None
    suite = TaskSection(name="a", file="a", score="exact").model_dump(mode="json")
    return suite.get(key.rpartition(".")[2])


def _median_metric(record: Run, key: str) -> float | None:
    values = [r[key] for r in record.metrics if r.get(key) is not None]
    return median(values) if values else None


def _describe_difference(difference: PairedDifference | None) -> str | None:
    if difference is None:
        return None
    mean = format_difference(difference.mean)
    if not difference.is_measurable:
        return f"{mean} nats a token"
    interval = format_interval((difference.low, difference.high))
    return f"{mean} nats a token (95 % interval {interval})"


def compare_runs(run_dirs: Sequence[str | Path]) -> RunComparison:
    """Read the runs in `run_dirs`, to be compared with the first of them.

    Raises ConfigError for none, or for what is no run directory.
    """
    if not run_dirs:
        raise ConfigError("There is no run to compare. Give the run directories, one or more.")
    return RunComparison(tuple(read_run(RunDirectory(Path(path))) for path in run_dirs))
