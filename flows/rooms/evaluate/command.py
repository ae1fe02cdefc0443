"""evaluate: suites and held-out losses of any models, without training."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from flows.commands.adapter_places import add_registry_flag
from flows.commands.command_output import add_output_flag, result_printer
from flows.terminal.console import print_blocks, print_line
from flows.terminal.run_follower import showing_stages
from nested_core.config.loading import load_config
from nested_core.config.sections import Score
from nested_core.errors import GateRejected
from nested_core.storage.output_places import require_output_file


def add_commands(commands: Any) -> None:
    """Add the command."""
    usage = "%(prog)s WHAT... [--suite FILE...] [--data FILE] [options]"
    example = "runs/first --suite questions.jsonl"
    parser = commands.add("evaluate", run_evaluation, "Inspect", example, json=True, usage=usage)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="WHAT",
        help="a base, an adapter of mlx_lm or PEFT, a run, NAME, NAME@VERSION, REGISTRY/NAME, an "
        "exported folder or a GGUF",
    )
    parser.add_argument(
        "--suite", nargs="+", type=Path, default=(), metavar="FILE", help="questions, a line each"
    )
    parser.add_argument(
        "--score",
        choices=get_args(Score),
        metavar="SCORE",
        help=f"of --suite, one of {', '.join(get_args(Score))} (default: that of the same file in "
        "gate.tasks of the first run, else contains)",
    )
    parser.add_argument("--min", type=float, metavar="SHARE", help="least share of right answers")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="of an answer (default: as in gate.tasks where --score is not given, else 64)",
    )
    parser.add_argument(
        "--in", dest="program", choices=("llama.cpp",), help="ask GGUFs there, and not in MLX"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="held-out examples, for losses")
    parser.add_argument("--against", metavar="WHAT", help="default: the base of the first")
    parser.add_argument("--model", metavar="BASE", help="of adapters that name none")
    parser.add_argument(
        *("-c", "--config"),
        type=Path,
        help="how data is read, and eval sets instead of --suite (default: the first run's)",
    )
    parser.add_argument(
        "--show",
        type=int,
        default=3,
        metavar="N",
        help="wrong answers shown of each eval set (default: 3)",
    )
    add_output_flag(parser, "write a page with every answer")
    add_registry_flag(parser)


def run_evaluation(arguments: argparse.Namespace) -> Callable[[], int]:
    """Ask models without training, and compare them.

    The exit code is 4 if a model is significantly worse than the reference, or below --min.
    """
    output: Path | None = arguments.output
    target = None if output is None else require_output_file(output, "-o")
    given = {key: getattr(arguments, key) for key in ("score", "min", "max_tokens")}
    settings = {key: value for key, value in given.items() if value is not None}
    suites = [{"file": str(path)} | settings for path in arguments.suite]
    config = None if arguments.config is None else load_config(arguments.config, {})
    with showing_stages("evaluate: loading the libraries"):
        from nested_core.rooms.evaluate.evaluating import evaluate  # loads mlx_lm, in seconds
        from nested_core.storage.atomic import write_page

        evaluation = evaluate(
            arguments.models,
            suites=suites,
            data=arguments.data,
            against=arguments.against,
            config=config,
            registry=arguments.registry,
            base_model=arguments.model,
            program=arguments.program,
        )
    if target is not None:
        write_page(target, evaluation.to_html())

    def show() -> None:
        """Print a table for each suite and one of losses, and the path of the page."""
        print_blocks(*evaluation.describe(arguments.show).blocks)
        if output is not None:
            print_line(f"page: {output}")

    code = GateRejected.exit_code if evaluation.is_worse else 0
    return result_printer(arguments, evaluation.to_json, show, code)
