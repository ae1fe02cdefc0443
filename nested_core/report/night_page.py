"""The first page of a night's flow run: what it came to in six lines, and what it answered."""

from __future__ import annotations

import shlex
import textwrap
from itertools import zip_longest

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import shorten
from nested_core.records.answers import AnswerRecord
from nested_core.records.dataset import DatasetReport, Severity
from nested_core.records.outcome import Outcome
from nested_core.records.run import Run
from nested_core.records.verdict import Verdict
from nested_core.registry.queries import parent_version_of
from nested_core.report.verdict_page import describe_quality, describe_suites
from nested_core.text.digest_format import shorten_digest
from nested_core.text.markdown_page import MarkdownPage
from nested_core.training.reports.sample_prompts import SampleTable

CRASHED_RUN_NOTE = (
    "A run whose state is Crashed or Cancelled was ended before it could say so here: Retry goes "
    "on from its last checkpoint."
)
MAX_SHOWN_ANSWERS = 5
MAX_SHOWN_CHARACTERS = 160  # of a question or an answer
MAX_CELL_CHARACTERS = 40  # two such columns fit a window of 1,280 pixels
MAX_SHOWN_CHECKS = 4
PROBLEM_SEVERITIES: tuple[Severity, ...] = ("error", "warning")  # of a finding that is more than a figure about the data


def join_lines(message: str) -> str:
    """The message on one line; an error in a data set lists what was found, a line each."""
    joined = ""
    for line in filter(None, map(str.strip, message.splitlines())):
        separator = "" if not joined else " " if joined.endswith((".", ":")) else "; "
        joined += f"{separator}{line}"
    return joined


def describe_night(config: FineTuneConfig, run: Run, outcome: str, message: str) -> MarkdownPage:
    """The page, from the files of the run directory that are there."""
    dataset, verdict = run.dataset, run.verdict
    yet = " yet" if outcome == Outcome.RUNNING else ""
    page = MarkdownPage(f"{config.registry.name or 'Fine-tune'}: {outcome}")
    page.add_facts(
        [
            ("Verdict", join_lines(message)),
            ("Loss", " ".join(describe_quality(verdict)) if verdict else f"not judged{yet}"),
            ("Answers", describe_suites(verdict) if verdict else f"not asked{yet}"),
            ("Data", _describe_data(config, dataset)),
            ("Made of", _describe_model_and_digests(config, dataset, verdict)),
            ("Run folder", f"{run.path.resolve()} on the worker's machine"),
        ]
    )
    if outcome == Outcome.RUNNING:
        page.add_paragraph(CRASHED_RUN_NOTE)
    page.add_paragraph("The same again, on that machine:")
    config_file = shlex.quote(str(run.folder.config.resolve()))
    page.add_code("nested-tune train --run-dir again \\", f"  -c {config_file}")
    pairs = _pair_answers(run)
    if pairs:
        page.add_heading("Answers before and after")
    for before, after in pairs:
        scores = f"{before.score:.3g} -> {after.score:.3g}"
        page.add_paragraph(f"{shorten(after.question, MAX_SHOWN_CHARACTERS)}: score {scores}")
        rows = zip_longest(_wrap(before.answer), _wrap(after.answer), fillvalue="")
        page.add_table(("before", "after"), rows)
    _add_samples(page, run, None if verdict is None else verdict.adapter_step)
    return page


def _describe_data(config: FineTuneConfig, dataset: DatasetReport | None) -> str:
    """Which data, how many examples of each split, and what was found in them."""
    source = str(config.data)
    if dataset is None:
        return f"{source}, not read yet"
    rows = ", ".join(f"{split.rows:,} {name}" for name, split in dataset.splits.items())
    counts = dataset.counts
    totals = ", ".join(f"{counts[s]} {s}" for s in PROBLEM_SEVERITIES if counts[s])
    checks = sorted({finding.check for finding in (*dataset.errors, *dataset.warnings)})
    named = f" ({', '.join(checks[:MAX_SHOWN_CHECKS])})" if checks else ""
    return f"{source}: {rows} examples; {totals or 'no error and no warning'}{named}"


def _describe_model_and_digests(
    config: FineTuneConfig, dataset: DatasetReport | None, verdict: Verdict | None
) -> str:
    """The model, where training began and how it went on, and the digests of what went in and out.

    These are the settings that two nights of one adapter differ by most often.
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


def _pair_answers(run: Run) -> list[tuple[AnswerRecord, AnswerRecord]]:
    """A few questions' answers before and after; those that changed come first."""
    by_question: dict[tuple[str, int], dict[str, AnswerRecord]] = {}
    for record in run.answers:
        by_question.setdefault((record.task, record.line), {})[record.model] = record
    pairs = []
    for models in by_question.values():
        before = models.get("parent") or models.get("base")
        if before is not None and "candidate" in models:
            pairs.append((before, models["candidate"]))
    return sorted(pairs, key=lambda pair: pair[0].answer == pair[1].answer)[:MAX_SHOWN_ANSWERS]


def _add_samples(page: MarkdownPage, run: Run, judged_step: int | None) -> None:
    """The answers to the prompts of `samples` at the evaluations, if there were any prompts."""
    samples = SampleTable.from_metrics(run.metrics, judged_step)
    if samples is None:
        return
    page.add_heading("Samples")
    page.add_paragraph(
        f"Answers at {samples.describe()}; all are in metrics.jsonl of the run folder."
    )
    for number, prompt in enumerate(samples.prompts):
        page.add_paragraph(shorten(prompt, MAX_SHOWN_CHARACTERS))
        rows = [
            (step if line_number == 0 else "", line)
            for step, answers in samples.rows
            for line_number, line in enumerate(
                _wrap(answers[number] or "-", 2 * MAX_CELL_CHARACTERS)
            )
        ]
        page.add_table(("step", "answer"), rows)


def _wrap(text: str, width: int = MAX_CELL_CHARACTERS) -> list[str]:
    """The lines of an answer in a table: one of Prefect's UIs cuts what is too wide for it."""
    return textwrap.wrap(shorten(text, MAX_SHOWN_CHARACTERS), width) or [""]
