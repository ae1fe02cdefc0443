"""report.html: a run as one page, at any of its states.

One file that runs nothing and fetches nothing, light and dark, readable on a phone. It is made of
the run's other files and no file rests on it: it can be removed and written again.
"""

from __future__ import annotations

import platform
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nested_core.backend import RECORDED_PACKAGES
from nested_core.config.loading import render_config
from nested_core.errors import join_first_values
from nested_core.gate.verdict_table import CHECK_COLUMNS, list_checks
from nested_core.records.dataset import group_findings
from nested_core.records.run import Run, read_run
from nested_core.records.verdict import REASON_WORDS, Verdict, describe_examples
from nested_core.report.line_charts import draw_figure
from nested_core.report.verdict_sections import (
    decisive_numbers,
    paired_losses_section,
    tasks_section,
    tier_updates_section,
    weight_change_section,
)
from nested_core.storage.atomic import write_bytes
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.html_markup import (
    Html,
    collapsed,
    element,
    key_numbers,
    notebook_fragment,
    page,
    paragraph,
    preformatted,
    section,
    table,
    truncated_text,
)
from nested_core.text.loss_format import format_loss
from nested_core.text.svg_chart import Chart, Curve

MAX_SHOWN_FINDINGS = 60
MAX_SHOWN_REASONS = 20
MAX_SHOWN_RESUMPTIONS = 5
MAX_FINDING_CHARACTERS = 300
MAX_CONFIG_CHARACTERS = 12_000
_CSS_CLASS_BY_STATE = {"verified": "good", "rejected": "bad"}


@dataclass(frozen=True, repr=False)
class RunReport:
    """The page of a run, and what it was made of; in a notebook it shows itself.

    run: as it was read.
    error: what ended the run, where this process knows.
    """

    run: Run
    error: str | None = None

    def to_html(self) -> str:
        """The whole page."""
        name = self.run.name
        header = element(
            "header",
            element("h1", "Run ", element("code", name)),
            paragraph(self._describe_progress(), class_="note"),
        )
        footer = element(
            "footer",
            paragraph(
                "Written by nested-tune from the files of the run; `nested-tune report` writes it "
                "again.",
                class_="note",
            ),
        )
        title = f"{describe_in_a_sentence(self.run)[:60]} · {name}"
        return page(title, header, element("main", *self._sections()), footer)

    def __repr__(self) -> str:
        return f"RunReport({self.run.path}, {describe_in_a_sentence(self.run)})"

    def _repr_html_(self) -> str:
        return notebook_fragment(*self._sections())

    def write(self, path: Path) -> None:
        """Write the page, atomically."""
        write_bytes(path, self.to_html().encode("utf-8", "replace"))

    def _describe_progress(self) -> str:
        now = datetime.now(UTC)
        length = self.run.describe_length()
        return (
            f"{self.run.state}, {length}; begun "
            f"{self.run.started:%Y-%m-%d %H:%M} UTC, this page {now:%Y-%m-%d %H:%M} UTC"
        )

    def _sections(self) -> Iterator[Html]:
        yield self._verdict_section()
        yield tasks_section(self.run)
        yield paired_losses_section(self.run)
        yield _curves_section(self.run)
        yield weight_change_section(self.run)
        yield tier_updates_section(self.run)
        yield _findings_section(self.run)
        yield _reproduction_section(self.run)

    def _verdict_section(self) -> Html:
        record = self.run
        color = _CSS_CLASS_BY_STATE.get(record.state, "")
        verdict = record.verdict
        if verdict is not None and verdict.has_passed and verdict.has_broken_answers:
            color = "warn"
        elif color == "good" and verdict is not None and not verdict.is_conclusive:
            color = ""
        class_ = f"verdict {color}".strip()
        parts = [paragraph(describe_in_a_sentence(record), class_=class_)]
        if verdict is not None and not verdict.has_passed:
            parts.append(paragraph(f"{verdict.reasons[0].message[:2000]}."))
        elif self.error is not None:
            parts.append(paragraph(truncated_text(self.error, 2000), class_="bad"))
        if record.problems:
            listed = [element("li", truncated_text(problem)) for problem in record.problems[:20]]
            parts += [paragraph("Damaged files:", class_="bad"), element("ul", *listed)]
        if verdict is not None:
            rows = [
                (*cells, element("span", word, class_="bad") if check.has_failed else word)
                for check in list_checks(verdict)
                for *cells, word in [check.cells]
            ]
            parts.append(table("What was checked", CHECK_COLUMNS, rows))
            if len(verdict.reasons) > 1:
                parts.append(_reasons_table(verdict))
            parts += [
                paragraph(truncated_text(note, 600), class_="warn") for note in verdict.notes()
            ]
            parts.append(key_numbers(decisive_numbers(verdict)))
        red_flags = () if record.result is None else record.result.red_flags
        if red_flags:
            flags = [element("li", truncated_text(flag)) for flag in red_flags[:10]]
            parts += [
                paragraph("Red flags while it trained:", class_="warn"),
                element("ul", *flags),
            ]
        return section("verdict", "Verdict", *parts)


def describe_in_a_sentence(record: Run) -> str:
    """The verdict in one sentence, or how far a run without one has come."""
    verdict = record.verdict
    if verdict is not None:
        return _describe_verdict(verdict)
    of_all = "" if record.steps is None else f" of {record.steps:,}"
    step = f"step {record.step:,}{of_all}"
    losses = [
        f"{name} loss {format_loss(last[1])}"
        for name, last in (
            ("training", record.last_loss("train_loss")),
            ("validation", record.last_loss("val_loss")),
        )
        if last is not None
    ]
    measured = f", {', '.join(losses)}" if losses else ""
    if record.state == "running":
        return f"Running: {step}{measured}."
    if record.state == "trained":
        return f"Trained to {step}, not judged yet{measured}."
    if record.dataset is not None and record.dataset.errors:
        return "Failed: the data set was rejected, and nothing was trained."
    if record.state == "never began":
        return "Never began: it was refused before its first step, and nothing was trained."
    return f"Not judged: it ended at {step}{measured}; --resume goes on from its last checkpoint."


def _describe_verdict(verdict: Verdict) -> str:
    if not verdict.has_passed:
        first = verdict.reasons[0]
        more = len(verdict.reasons) - 1
        noun = "reason" if more == 1 else "reasons"
        others = f", and {more} more {noun}" if more else ""
        suite = "" if first.suite is None else f", {first.suite}"
        return f"Rejected: {REASON_WORDS[first.code]} ({first.code}{suite}){others}."
    words = verdict.describe_passed()
    passed = f"{words[0].upper()}{words[1:]}"
    losses = verdict.validation
    if losses is None and not verdict.tasks:
        return f"{passed}: changed and sound, and nothing was held out to measure it by."
    parts = []
    if losses is not None and losses.loss_before is not None and losses.loss_after is not None:
        before, after = format_loss(losses.loss_before), format_loss(losses.loss_after)
        parts.append(f"loss {before} → {after} on {describe_examples(losses)}")
    elif losses is not None and losses.examples == 0:
        parts.append("loss not judged, for all held-out examples were trained on")
    parts += [
        f"{task.candidate * task.questions:g} of {task.questions} right answers to {task.name}"
        for task in verdict.tasks
    ]
    return f"{passed}: {', '.join(parts)}."


def _reasons_table(verdict: Verdict) -> Html:
    rows = [
        (reason.name, truncated_text(reason.message), len(reason.tensors))
        for reason in verdict.reasons[:MAX_SHOWN_REASONS]
    ]
    return table("Every reason against the adapter", ("code", "message", "tensors"), rows)


def _curves_section(record: Run) -> Html:
    """Losses over steps and seconds, rate, gradient norm, speed and memory."""
    drawn = [
        draw_figure([_loss_chart(record, "step"), _loss_chart(record, "seconds of training")]),
        _metric_figure(record, "Learning rate", "rate", {"learning rate": "learning_rate"}),
        _metric_figure(
            record,
            "Gradient norm",
            "norm",
            {"before clipping": "grad_norm", "after clipping": "clipped_grad_norm"},
        ),
        _metric_figure(record, "Peak memory", "GB", {"peak memory": "peak_memory_gb"}),
        _metric_figure(record, "Speed", "tokens a second", {"tokens/s": "tokens_per_second"}),
    ]
    if not any(drawn):
        return section("curves", "Training", paragraph("Nothing was reported yet."))
    sentences = _describe_curves(record)
    return section("curves", "Training", sentences, element("div", *drawn, class_="charts"))


def _describe_curves(record: Run) -> Html:
    """Where it was resumed, the judged step, the losses' data, and the memory that was planned."""
    sentences = []
    plan, verdict = record.plan, record.verdict
    if plan is not None and plan.resumed_at:
        noun = "step" if len(plan.resumed_at) == 1 else "steps"
        places = join_first_values([f"{step:,}" for step in plan.resumed_at], MAX_SHOWN_RESUMPTIONS)
        sentences.append(
            f"The run was resumed at {noun} {places}: the curves go on from the checkpoint there, "
            f"and each step and its seconds of training are counted once."
        )
    if verdict is not None and verdict.adapter_step is not None:
        sentences.append(
            f"The adapter of step {verdict.adapter_step:,} is the one that was judged."
        )
    if plan is not None and plan.validation_file is not None:
        sentences.append(f"Validation losses are of {plan.describe_validation()}.")
    if plan is not None:
        sentences.append(
            f"Memory: {plan.memory_forecast_gb:.3g} GB were forecast, {plan.memory_limit_gb:.3g} "
            f"GB may be used."
        )
    return paragraph(" ".join(sentences), class_="note") if sentences else Html("")


def _loss_chart(record: Run, x: str) -> Chart:
    curves = [
        Curve("training", record.points("loss", x)),
        Curve("validation", record.points("val_loss", x), has_dots=True),
    ]
    return Chart("Loss", x, "nats a token", curves)


def _metric_figure(record: Run, title: str, unit: str, keys: dict[str, str]) -> Html:
    curves = [Curve(name, record.points(key)) for name, key in keys.items()]
    return draw_figure([Chart(title, "step", unit, curves, from_zero=title != "Gradient norm")])


def _findings_section(record: Run) -> Html:
    """What the validation of the data said, by file and line."""
    if record.dataset is None:
        return section("data", "Data", paragraph("The data was not validated yet."))
    groups = group_findings(record.dataset.findings)
    rows = [
        (
            group.severity,
            group.file,
            group.shown_lines,
            group.count,
            group.check,
            truncated_text(group.message, MAX_FINDING_CHARACTERS),
        )
        for group in groups[:MAX_SHOWN_FINDINGS]
    ]
    serious = sum(group.severity != "info" for group in groups)
    sentence = "No error and no warning." if not serious else f"{serious} to look at, first."
    columns = ("severity", "file", "line", "count", "check", "message")
    listed = table(f"Findings in {record.dataset.folder}; all: dataset.json", columns, rows)
    content = listed if serious else collapsed("What was counted", listed)
    return section("data", "Data", paragraph(sentence), content)


def _reproduction_section(record: Run) -> Html:
    """Configuration, digests, versions and the command of the run."""
    path = record.path
    command = f"nested-tune train -c {shlex.quote(str(path / 'config.yaml'))} --run-dir NEW_FOLDER"
    parts = [preformatted("Command", command)]
    if record.config is not None:
        text = render_config(record.config).decode()
        shown = text[:MAX_CONFIG_CHARACTERS]
        cut = "" if shown == text else "…\n"
        parts.append(collapsed("config.yaml", preformatted("config.yaml", shown + cut)))
    parts.append(table("Digests", ("of", "digest"), list(_list_digests(record))))
    rows = [("Python", platform.python_version()), ("platform", platform.platform())]
    rows += [(package, _installed_version(package)) for package in RECORDED_PACKAGES]
    caption = "Versions of the process that wrote this page"
    parts.append(collapsed("Versions", table(caption, ("package", "version"), rows)))
    return section("reproduce", "To reproduce", *parts)


def _list_digests(record: Run) -> Iterator[tuple[str, Html]]:
    verdict, dataset = record.verdict, record.dataset
    if dataset is not None:
        yield "data set", _code_element(dataset.digest)
        for split, stats in dataset.splits.items():
            yield f"{split}, {stats.rows:,} examples", _code_element(stats.digest)
    if verdict is not None:
        yield "initial adapter", _code_element(verdict.initial.digest)
        yield "trained adapter", _code_element(verdict.trained.digest)
        if verdict.champion is not None:
            yield "champion", _code_element(verdict.champion.version)
        if verdict.validation is not None and verdict.validation.losses_sha256 is not None:
            yield "gate-losses.jsonl", _code_element(verdict.validation.losses_sha256)


def _code_element(text: str) -> Html:
    return element("code", text)


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def read_report(run_dir: str | Path) -> RunReport:
    """The report of a run, at any state; ConfigError if `run_dir` is no run directory."""
    return RunReport(read_run(RunDirectory(Path(run_dir))))


@contextmanager
def writing_report_at_end(run: RunDirectory) -> Iterator[None]:
    """Write the run's report.html when the block ends, with what ended it; under the run's lock.

    A page that cannot be written is a warning: no run fails for want of it.
    """
    error: str | None = None
    try:
        yield
    except BaseException as raised:
        error = str(raised) or type(raised).__name__
        raise
    finally:
        try:
            report = RunReport(read_run(run, has_ended=True), error)
            run.require_lock()
            report.write(run.report)
        except Exception as failure:
            warnings.warn(f"{run.report} was not written: {failure}", stacklevel=3)
