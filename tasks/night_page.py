"""The first page of a flow run: what the night came to in six lines, and what it answered."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Completed, State

from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import NestedTuneError
from nested_core.gate.answers.answer_records import AnswerRecord, read_answers
from nested_core.storage.run_directory import RunDirectory, find_run_of
from nested_core.storage.strict_files import read_json_object
from nested_core.text.digest_format import shorten_digest
from nested_core.training.metrics_file import read_metrics
from nested_core.training.sample_prompts import SampleTable
from tasks.artifact_client import ArtifactClient, artifact_key
from tasks.markdown_page import MarkdownPage
from tasks.nights_page import publish_nights
from tasks.outcomes import Outcome
from tasks.server_outage import tolerating_server_outage
from tasks.verdict_text import (
    describe_champion_loss,
    describe_drift,
    describe_losses,
    describe_suite,
)

UNDER_WAY = "Under way"
CRASHED_RUN_NOTE = (
    "A run whose state is Crashed or Cancelled was ended before it could say so here: Retry goes "
    "on from its last checkpoint."
)
MAX_SHOWN_ANSWERS = 5
MAX_SHOWN_CHARACTERS = 160  # of a question or an answer
MAX_CELL_CHARACTERS = 40  # two such columns fit a window of 1,280 pixels
MAX_SHOWN_CHECKS = 4
DATASET_PROBLEM_SEVERITIES = (
    "error",
    "warning",
)  # of a finding that is more than a figure about the data


def tell_night(night: UUID, outcome: Outcome, message: str) -> None:
    """Say what became of the question that a night asked: in its state's name, and on its page.

    `night` is the fine-tune's flow run. Its state stays of the type Completed, and when it ended
    stays as it was. The page stays as it was where the run's folder is not on this machine.
    """
    with (
        tolerating_server_outage("the night's page does not say what became of its question"),
        get_client(sync_client=True) as client,
    ):
        state = client.read_flow_run(night).state
        if state is None or state.type != StateType.COMPLETED or state.name == outcome:
            return
        said = f"{state.message}; {message}"
        told: State[None] = Completed(name=outcome, message=said)
        client.set_flow_run_state(night, told, force=True)
        run = find_run_of(night)
        if run is not None:
            config = read_run_config(run)
            publish_night(config, run, outcome, said, flow_run=night)
            publish_nights(config.registry.name)


def publish_night(
    config: FineTuneConfig,
    run: RunDirectory,
    outcome: str,
    message: str,
    *,
    flow_run: UUID | None = None,
) -> None:
    """Publish the page, or replace it; a file of the run that cannot be read is only logged.

    `outcome` is the name of the flow run's state, `message` what the state says; `flow_run` is the
    run that the page belongs to, where that is not the one at work.
    """
    name = config.registry.name
    shown = _join_lines(message).removeprefix(f"{outcome.lower()}: ")
    description = f"{outcome}: {shown}"  # a list shows the first 40 characters
    try:
        page = describe_night(config, run, outcome, message)
    except (NestedTuneError, OSError) as error:  # the night is over: a page changes nothing
        get_run_logger().warning("The page of this night is not up to date: %s", error)
        return
    with ArtifactClient(flow_run) as artifacts:
        artifacts.publish_page(artifact_key(name, "night"), page, description)


def _join_lines(message: str) -> str:
    """The message on one line; an error in a data set lists what was found, a line each."""
    joined = ""
    for line in filter(None, map(str.strip, message.splitlines())):
        separator = "" if not joined else " " if joined.endswith((".", ":")) else "; "
        joined += f"{separator}{line}"
    return joined


def describe_night(
    config: FineTuneConfig, run: RunDirectory, outcome: str, message: str
) -> MarkdownPage:
    """The page, from the files of the run directory that are there."""
    dataset = _read_or_empty(run.dataset)
    verdict = _read_or_empty(run.gate)
    yet = " yet" if outcome == UNDER_WAY else ""
    page = MarkdownPage(f"{config.registry.name or 'Fine-tune'}: {outcome}")
    page.add_facts(
        [
            ("Verdict", _join_lines(message)),
            ("Loss", _describe_candidate(verdict) if verdict else f"not judged{yet}"),
            ("Answers", _describe_suites(verdict) if verdict else f"not asked{yet}"),
            ("Data", _describe_data(config, dataset)),
            ("Made of", _describe_model_and_digests(config, run, dataset, verdict)),
            ("Run folder", f"{run.path.resolve()} on the worker's machine"),
        ]
    )
    if outcome == UNDER_WAY:
        page.add_paragraph(CRASHED_RUN_NOTE)
    page.add_paragraph("The same again, on that machine:")
    page.add_code(
        "nested-tune train --run-dir again \\", f"  -c {shlex.quote(str(run.config.resolve()))}"
    )
    answers = list(_pair_answers(run))
    if answers:
        page.add_heading("Answers before and after")
    for scores, question, before, after in answers:
        page.add_paragraph(f"{question}: score {scores}")
        page.add_table(("before", "after"), zip_longest(_wrap(before), _wrap(after), fillvalue=""))
    _add_samples(page, run, verdict)
    return page


def _read_or_empty(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _describe_candidate(verdict: Mapping[str, Any]) -> str:
    """The candidate's loss against what training began from and the champion's, and its drift."""
    if not verdict.get("validation"):
        return "no validation set, so that no loss was measured"
    sentences = [f"{describe_losses(verdict)}."]
    champion = verdict.get("champion")
    if champion is None:
        sentences.append("There was no champion to compare with.")
    else:
        sentences.append(describe_champion_loss(champion))
    if verdict.get("drift"):
        sentences.append(f"{describe_drift(verdict['drift'])}.")
    return " ".join(sentences)


def _describe_suites(verdict: Mapping[str, Any]) -> str:
    suites = verdict.get("tasks") or []
    return "; ".join(map(describe_suite, suites)) or "no suite of questions (gate.tasks) was asked"


def _describe_data(config: FineTuneConfig, dataset: Mapping[str, Any]) -> str:
    """Which data, how many examples of each split, and what was found in them."""
    source = str(config.data)
    if not dataset:
        return f"{source}, not read yet"
    splits = dataset.get("splits") or {}
    rows = ", ".join(f"{split['rows']:,} {name}" for name, split in splits.items())
    counts = {
        key: count
        for key, count in dataset.get("counts", {}).items()
        if key in DATASET_PROBLEM_SEVERITIES
    }
    totals = ", ".join(f"{count} {severity}" for severity, count in counts.items() if count)
    problems = [
        f for f in dataset.get("findings") or [] if f["severity"] in DATASET_PROBLEM_SEVERITIES
    ]
    checks = sorted({finding["check"] for finding in problems})
    named = f" ({', '.join(checks[:MAX_SHOWN_CHECKS])})" if checks else ""
    return f"{source}: {rows} examples; {totals or 'no error and no warning'}{named}"


def _describe_model_and_digests(
    config: FineTuneConfig,
    run: RunDirectory,
    dataset: Mapping[str, Any],
    verdict: Mapping[str, Any],
) -> str:
    """The model, where training began and how it went on, and the digests of what went in and out.

    These are the settings that two nights of one adapter differ by most often.
    """
    parts = [f"model {config.model}"]
    if verdict.get("initial"):
        parts.append(f"from {_describe_initial_adapter(config, run, verdict['initial']['digest'])}")
    parts.append(f"{config.length}, learning rate {config.learning_rate:g}, seed {config.seed}")
    if config.registry.name is not None:
        parts.append(f"registry.promote: {config.registry.promote}")
    if dataset.get("digest"):
        parts.append(f"data {shorten_digest(dataset['digest'])}")
    if verdict.get("initial"):
        parts.append(f"initial adapter {shorten_digest(verdict['initial']['digest'])}")
    if verdict.get("trained"):
        parts.append(f"adapter {shorten_digest(verdict['trained']['digest'])}")
    return ", ".join(parts)


def _describe_initial_adapter(config: FineTuneConfig, run: RunDirectory, digest: str) -> str:
    from nested_core.pipeline.continual import parent_version_of  # which loads mlx

    parent = parent_version_of(config, run, digest)
    if parent is not None:
        return f"version {shorten_digest(parent)}"
    given = config.resume_adapter_file
    return "a fresh adapter" if given is None else f"the adapter {given}"


def _pair_answers(run: RunDirectory) -> Iterator[tuple[str, str, str, str]]:
    """A few questions with the answers before and after; those that changed come first."""
    if not run.answers.exists():
        return
    by_question: dict[tuple[str, int], dict[str, AnswerRecord]] = {}
    for record in read_answers(run.answers):
        by_question.setdefault((record.task, record.line), {})[record.model] = record
    pairs = []
    for models in by_question.values():
        before = models.get("parent") or models.get("base")
        after = models.get("candidate")
        if before is not None and after is not None:
            pairs.append((before, after))
    pairs.sort(key=lambda pair: pair[0].answer == pair[1].answer)
    for before, after in pairs[:MAX_SHOWN_ANSWERS]:
        scores = f"{before.score:.3g} -> {after.score:.3g}"
        yield (
            scores,
            _shorten_answer(after.question),
            _shorten_answer(before.answer),
            _shorten_answer(after.answer),
        )


def _add_samples(page: MarkdownPage, run: RunDirectory, verdict: Mapping[str, Any]) -> None:
    """The answers to the prompts of `samples` at the evaluations, if there were any prompts."""
    samples = SampleTable.from_metrics(read_metrics(run.metrics), verdict.get("adapter_step"))
    if samples is None:
        return
    page.add_heading("Samples")
    page.add_paragraph(
        f"Answers at {samples.describe()}; all are in metrics.jsonl of the run folder."
    )
    for number, prompt in enumerate(samples.prompts):
        page.add_paragraph(_shorten_answer(prompt))
        rows = [
            (step if line_number == 0 else "", line)
            for step, answers in samples.rows
            for line_number, line in enumerate(
                _wrap(_shorten_answer(answers[number] or "-"), 2 * MAX_CELL_CHARACTERS)
            )
        ]
        page.add_table(("step", "answer"), rows)


def _wrap(text: str, width: int = MAX_CELL_CHARACTERS) -> list[str]:
    """The lines of an answer in a table: one of Prefect's UIs cuts what is too wide for it."""
    return textwrap.wrap(text, width) or [""]


def _shorten_answer(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."
