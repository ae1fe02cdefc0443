"""evaluate: suites and held-out losses of any models, without training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, get_args

from flows.commands.adapter_places import add_registry_flag
from flows.commands.command_output import result_printer
from flows.terminal.console import print_line, print_table
from nested_core.config.loading import load_config
from nested_core.config.sections import Score
from nested_core.errors import ConfigError, GateRejected
from nested_core.text.loss_format import format_difference, format_interval, format_loss

if TYPE_CHECKING:
    from nested_core.pipeline.evaluation import Evaluation

SHOWN_QUESTIONS = 3
COMPARED = ("difference", "95 % interval", "verdict")
MAX_MODELS = len(ascii_uppercase) - 1  # each has a letter, and the base one


def add_commands(commands: Any) -> None:
    """Add the command."""
    parser = commands.add(
        "evaluate",
        run_evaluation,
        "ask models without training, and compare them",
        json=True,
        usage="%(prog)s WHAT... [--suite FILE...] [--data FILE] [options]",
        group="Inspect",
        example="nested-tune evaluate runs/first --suite questions.jsonl",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="WHAT",
        help="a base, an adapter of mlx_lm or PEFT, a run, NAME, NAME@VERSION or REGISTRY/NAME",
    )
    parser.add_argument(
        "--suite", nargs="+", type=Path, default=(), metavar="FILE", help="questions, a line each"
    )
    parser.add_argument(
        "--score",
        choices=get_args(Score),
        default="contains",
        metavar="SCORE",
        help=f"of --suite, one of {', '.join(get_args(Score))}; default: contains",
    )
    parser.add_argument("--min", type=float, metavar="SHARE", help="the least share of each suite")
    parser.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="of an answer; default: 64"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="held-out examples, for losses")
    parser.add_argument("--against", metavar="WHAT", help="default: the base of the first")
    parser.add_argument("--model", metavar="BASE", help="of adapters that name none")
    parser.add_argument(
        *("-c", "--config"),
        type=Path,
        help="how data is read, and suites in place of --suite; default: the first run's own",
    )
    parser.add_argument(
        "--show",
        type=int,
        default=SHOWN_QUESTIONS,
        metavar="N",
        help=f"wrong answers of each suite; default: {SHOWN_QUESTIONS}",
    )
    add_registry_flag(parser)


def run_evaluation(arguments: argparse.Namespace) -> Callable[[], int]:
    """Ask and measure; exit 4 where a model is significantly worse, or below --min."""
    if len(arguments.models) > MAX_MODELS:
        raise ConfigError(f"evaluate: at most {MAX_MODELS} models at once.")
    settings = {key: getattr(arguments, key) for key in ("score", "min", "max_tokens")}
    suites = [{"name": path.stem, "file": str(path)} | settings for path in arguments.suite]
    config = None if arguments.config is None else load_config(arguments.config, {})
    from nested_core.pipeline.evaluation import evaluate  # loads mlx_lm, which takes seconds

    found = evaluate(
        arguments.models,
        suites=suites,
        data=arguments.data,
        against=arguments.against,
        config=config,
        registry=arguments.registry,
        base_model=arguments.model,
    )
    code = GateRejected.exit_code if found.is_worse else 0
    return result_printer(
        arguments, found.to_json, lambda: _print_evaluation(found, arguments.show), code
    )


def _print_evaluation(found: Evaluation, shown: int) -> None:
    letters = dict(zip((model.name for model in found.models), ascii_uppercase, strict=False))
    for name, letter in letters.items():
        what = " (the others are compared with it)" if name == found.against else ""
        print_line(f"{letter}: {name}{what}")
    for number, suite in enumerate(found.models[0].suites):
        rows = []
        for model in found.models:
            own = model.suites[number]
            verdict = "" if own.conclusion is None else str(own.conclusion)
            if own.is_below_minimum:
                verdict = f"{verdict}, below {own.minimum:g}".removeprefix(", ")
            right = f"{own.score * own.questions:.4g} of {own.questions}"
            compared = _compared(own.difference, own.interval)
            rows.append((letters[model.name], right, *compared, verdict))
        print_table(("", "right", *COMPARED), rows, title=suite.suite)
        _print_wrong_answers(found, suite.suite, letters, shown)
    if found.data is not None:
        _print_losses(found, letters)
    if found.is_worse:
        worse = ", ".join(letters[model.name] for model in found.models if model.is_worse)
        print_line(f"worse than {letters[found.against]}, or below a minimum: {worse}")


def _print_losses(found: Evaluation, letters: Mapping[str, str]) -> None:
    rows = []
    for model in found.models:
        loss, letter = model.loss, letters[model.name]
        if loss is None:
            rows.append((letter, "another tokenizer", "", "", ""))
        elif model.name == found.against:
            rows.append((letter, format_loss(loss.loss_after), "", "", ""))
        else:
            compared = _compared(loss.difference, loss.interval)
            verdict = str(loss.conclusion or "")
            rows.append((letter, format_loss(loss.loss_after), *compared, verdict))
    losses = [model.loss for model in found.models if model.loss is not None]
    examples = " or ".join(sorted({f"{loss.examples:,}" for loss in losses}))
    title = f"{Path(str(found.data)).name}, {examples} examples"
    print_table(("", "loss, nats/token", *COMPARED), rows, title=title)
    if left_out := max(loss.left_out for loss in losses):
        print_line(f"{left_out:,} examples left out that a model was trained on")


def _print_wrong_answers(
    found: Evaluation, suite: str, letters: Mapping[str, str], shown: int
) -> None:
    """The first questions that a model answered wrong, with what is expected."""
    wrong = [
        question
        for question in found.answers
        if question.suite == suite and min(question.scores.values()) < 1
    ][:shown]
    if wrong:
        rows = [(q.question, q.expected or "", *q.answers.values()) for q in wrong]
        title = f"{suite}: the first {len(rows)} questions with a wrong answer"
        print_table(("question", "expected", *letters.values()), rows, title=title)


def _compared(difference: float | None, interval: tuple[float, float] | None) -> tuple[str, str]:
    return (
        "" if difference is None else format_difference(difference),
        "" if interval is None else format_interval(interval),
    )
