"""validate, train and run: what is checked before they start, and what they print."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING, Any

from flows.commands.command_output import naming_report_of_failure, result_printer, text_printer
from flows.commands.config_flags import (
    add_config_flags,
    add_log_format,
    add_run_flags,
    choose_run_dir,
    load_config_from_flags,
)
from flows.commands.help_pages import Commands
from flows.process.stop_signals import Stopper
from flows.terminal.console import (
    ProgressLine,
    print_blocks,
    print_line,
    print_progress,
    print_table,
)
from flows.terminal.run_follower import showing_run
from flows.terminal.run_results import (
    format_sample_answers,
    list_notes,
    print_answer_tables,
    print_rejection,
    print_tiers,
)
from nested_core import backend
from nested_core.errors import ConfigError, GateRejected, TrainingStopped, go_on_with
from nested_core.storage.run_directory import open_run
from nested_core.text.digest_format import shorten_digest
from nested_core.text.foreign_text import escape

if TYPE_CHECKING:
    from prefect.states import State

    from nested_core.config.schema import FineTuneConfig
    from nested_core.config.sections import RegistrySection
    from nested_core.data.data_settings import DataSettings
    from nested_core.pipeline.finetune import FinetuneResult
    from nested_core.records.answers import SampleAnswers
    from nested_core.records.dataset import DatasetReport, Finding
    from nested_core.records.verdict import Verdict


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    validate = commands.add("validate", run_validate, "Train", "-c lora.yaml --show 3", json=True)
    add_config_flags(validate)
    validate.add_argument("--no-tokenize", action="store_true", help="check lines, not tokens")
    validate.add_argument(
        "--show", type=int, metavar="N", help="print the first N examples of train token by token"
    )
    train = commands.add(
        "train", run_train, "Train", "-c lora.yaml --run-dir runs/first", json=True
    )
    run = commands.add("run", run_flow, "Train", "-c lora.yaml --run-dir runs/first")
    for parser in (train, run):
        add_config_flags(parser)
        add_run_flags(parser)
    add_log_format(run)


def run_validate(arguments: argparse.Namespace) -> Callable[[], int]:
    """Check a data set.

    It writes nothing but the cache that `train` reads.
    """
    required = ["data"] if arguments.no_tokenize else ["model", "data"]
    config = load_config_from_flags(arguments, required)
    _refuse_invalid_show_flag(arguments)
    from flows.terminal.token_view import print_examples
    from nested_core.data.data_settings import DataSettings
    from nested_core.data.dataset_loading import dataset_cache, load_dataset
    from nested_core.data.rules.split_statistics import describe_split_stats
    from nested_core.data.tokens.tokenized_split import decode_examples_for_display
    from nested_core.data.tokens.tokenizer_source import TokenizerSource
    from nested_core.errors import DatasetError
    from nested_core.records.dataset import group_findings, guide_sentence
    from nested_core.report.page_blocks import show_data_set

    tokenizer = None if arguments.no_tokenize else TokenizerSource.from_config(config)
    settings = DataSettings.from_config(config)
    load = partial(load_dataset, tokenizer=tokenizer, cache=dataset_cache())
    report, splits = load(settings, on_progress=ProgressLine())
    if tokenizer is not None and config.gate.tasks:
        from nested_core.pipeline.steps import require_askable_suites  # mlx takes a second

        require_askable_suites(config, report.prompt_format)
    learnt = _compare_answer_tokens(report, settings, load)
    examples = []
    if tokenizer is not None and arguments.show and "train" in splits:
        train, count = report.splits["train"], arguments.show
        examples = decode_examples_for_display(
            splits["train"], train.file, tokenizer.load(), count, train.parts
        )

    def document() -> dict[str, Any]:
        """The report, with the examples that --show asks for."""
        shown = {"examples": [asdict(example) for example in examples]}
        return report.to_json() | (shown if arguments.show else {})

    def show() -> None:
        """Formats; what is wrong, a line for each check and cause; counts a file; examples."""
        for stats in report.splits.values():
            print_line(stats.describe_format())
        facts = {
            stats.file: {f.check: f for f in describe_split_stats(stats, config.batch_size)}
            for stats in report.splits.values()
        }
        findings = [f for f in report.findings if f not in facts.get(f.file, {}).values()]
        for group in group_findings(findings):
            print_line(f"{group.severity}: {group}")
        if not report.errors and not report.warnings:
            print_line("No errors and no warnings.")
        checks = dict.fromkeys(check for own in facts.values() for check in own)
        counts = [[check, *(_cell(own.get(check)) for own in facts.values())] for check in checks]
        print_table(("", *facts), counts)
        if learnt is not None:
            print_line(learnt)
        print_blocks(*show_data_set(settings))
        if explained := (*report.errors, *report.warnings):
            print_line(guide_sentence(explained))
        print_examples(examples, _describe_learnt_prompts(config, report))

    return result_printer(arguments, document, show, DatasetError.exit_code if report.errors else 0)


def _compare_answer_tokens(
    report: DatasetReport, settings: DataSettings, load: Callable[[DataSettings], Any]
) -> str | None:
    """How many answer tokens of train are trained on, of how many; None where all are."""
    train = report.splits["train"].tokens if "train" in report.splits else None
    if train is None or all(one.check != "earlier-answers" for one in report.findings):
        return None
    everything, _ = load(replace(settings, supervise="all"))
    every = everything.splits["train"].tokens
    if every is None or everything.errors:
        return None
    return f"warning: {train.supervised:,} of {every.supervised:,} answer tokens are trained on"


def _cell(fact: Finding | None) -> str | None:
    """A count of a file, its digest shortened."""
    if fact is None:
        return None
    return shorten_digest(fact.message) if fact.check == "digest" else fact.message


def _describe_learnt_prompts(config: FineTuneConfig, report: DatasetReport) -> str | None:
    """That prompts are trained on too, where the data has prompts and nothing masks them."""
    train = report.splits.get("train")
    from nested_core.data.lines.example_parsing import TEMPLATED_FORMATS

    learns_answers = config.mask_prompt or config.training.supervise == "all"
    if learns_answers or train is None or train.format not in TEMPLATED_FORMATS:
        return None
    return (
        "mask_prompt is false, as in mlx_lm: prompts are trained on too. With the file that "
        "`nested-tune init` writes (-c FILE), or --mask-prompt, the answers alone."
    )


def _refuse_invalid_show_flag(arguments: argparse.Namespace) -> None:
    if arguments.show is not None and (arguments.no_tokenize or arguments.show < 1):
        raise ConfigError(
            "validate --show N prints the tokens of the first N examples: N must be 1 or more, and "
            "--no-tokenize leaves no tokens to print. Give one of the two flags."
        )


def run_train(arguments: argparse.Namespace) -> Callable[[], int]:
    """Train an adapter and evaluate it."""
    config = load_config_from_flags(arguments)
    run = open_run(choose_run_dir(arguments), resume=arguments.resume)
    with backend.collecting_no_garbage():
        from flows.commands.terminal_hooks import TerminalSteps  # loads mlx, which takes seconds
        from nested_core.pipeline.finetune import finetune

    stopper = Stopper(ends_process=True)
    hooks = TerminalSteps(stopper)
    with stopper.handling_signals(run):
        print_progress(f"run directory: {run.path}")
        try:
            with naming_report_of_failure(run), showing_run(run):
                result = finetune(config, run, hooks, resume=arguments.resume)
        except GateRejected:
            print_progress(*format_sample_answers(hooks.sample_answers))
            print_rejection(run)
            raise

    return result_printer(
        arguments,
        lambda: _make_result_document(result, hooks.sample_answers),
        lambda: print_result(config, result, hooks.sample_answers),
    )


def _make_result_document(
    result: FinetuneResult, answers: Sequence[SampleAnswers]
) -> dict[str, object]:
    """The result as --json prints it."""
    from nested_core.records.run_status import Run

    if result.training is None or result.verdict is None:
        skipped = None if result.skipped is None else asdict(result.skipped)
        return {"run_dir": str(result.run.path), "skipped": skipped}
    return asdict(result.training) | {
        "verdict": "passed",
        "summary": result.verdict.summary(),
        "notes": list_notes(result.verdict, Run(result.run)),
        "answers_broken": bool(result.verdict.broken_answers),
        "test_loss": None if result.test_loss is None else result.test_loss.mean,
        "samples": [asdict(each) for each in answers],
        "version": result.version,
        "promotion": result.promotion,
    }


def print_result(
    config: FineTuneConfig, result: FinetuneResult, answers: Sequence[SampleAnswers]
) -> None:
    """Answers to a few prompts, the tiers, the verdict, where the adapter is, and what to do."""
    if result.verdict is None:
        print_line(escape(str(result.skipped)))
        return
    for line in format_sample_answers(answers):
        print_line(line)
    print_tiers(result.verdict)
    print_answer_tables(result.run)
    print_line(result.verdict.summary())
    print_line(f"adapter: {result.run.adapter}")
    if result.test_loss is not None:
        print_line(f"{result.test_loss.describe()}.")
    _print_outcome(config.registry, result, result.verdict)


def _print_outcome(registry: RegistrySection, result: FinetuneResult, verdict: Verdict) -> None:
    """What became of the adapter in the registry, where the page is, and how to go on."""
    from nested_core.records.run_status import Run
    from nested_core.records.verdict import LEARN_MORE
    from nested_core.report.outcome import describe_outcome

    if result.version is not None or result.kept_champion is not None:
        version = "" if result.version is None else f" {shorten_digest(result.version)}"
        print_line(f"{registry.name}{version}: {result.promotion or 'registered'}")
    run = Run(result.run)
    print_line(f"outcome: {describe_outcome(run)}")
    if run.plan is not None and (ends := run.plan.describe_ends(run.result)):
        print_line(ends)
    print_line(f"report: {result.run.report}")
    for note in list_notes(verdict, run):
        print_line(note)
    if registry.path is None and verdict.tone != "warn":
        print_progress(f"next: `nested-tune promote {quote(str(result.run.path))} --name NAME`")
    elif verdict.doubtful_answers and not verdict.broken_answers:
        print_progress(f"next: {LEARN_MORE}")


def run_flow(arguments: argparse.Namespace) -> Callable[[], int]:
    """Train an adapter as a Prefect flow.

    The flow runs here, with the run's own server unless PREFECT_API_URL is set.
    """
    config = load_config_from_flags(arguments)
    run = open_run(choose_run_dir(arguments), resume=arguments.resume)
    from nested_core.pipeline.preflight import require_output_places  # loads mlx
    from nested_core.pipeline.processes import load_services

    require_output_places(config, run)  # before a server is started, as what follows
    load_services(config)
    parameters = config.model_dump() | {"run_dir": str(run.path), "resume": arguments.resume}
    print_progress(f"run directory: {run.path}")
    with naming_report_of_failure(run):
        with Stopper().handling_signals(run), showing_run(run):
            state = run_finetune_flow(
                parameters, logging.NOTSET, as_json=arguments.log_format == "json"
            )
        if state.is_cancelled():
            raise TrainingStopped(
                f"The flow run was cancelled, {state.message} At the command line:",
                advice=go_on_with(run.path),
            )
        state.result()  # raises what made it fail
    ended = f"{state.name}: {state.message}"
    print_progress(ended)
    print_progress(f"report: {run.report}")
    return text_printer(f"adapter: {run.adapter}" if run.adapter.exists() else ended)


def run_finetune_flow(
    parameters: dict[str, Any], log_level: int, *, as_json: bool = False
) -> State[Any]:
    """Run the flow in this process; the state in which it ends."""
    from flows.process.local_server import prefect_server

    with prefect_server() as wait_for_server:
        from flows.finetune import FinetuneParameters, finetune  # while the server starts
        from flows.flow_runs.prefect_logs import print_records_as_json, show_logs_from_level

        show_logs_from_level(log_level)
        if as_json:
            print_records_as_json()
        wait_for_server()
        return finetune(FinetuneParameters(**parameters), return_state=True)
